"""From runs to the sections of a report: what stands beside what, and in which order."""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evalsuite.core.errors import ModelError, StorageError
from evalsuite.core.record import Record
from evalsuite.data.models import DEMO, find_checkpoint
from evalsuite.report.apart import checkpoint_names
from evalsuite.report.choose import (
    Lineage,
    device_of,
    grouped,
    model_of,
    newest,
    perplexity_condition,
    stand_ins,
)
from evalsuite.report.footprint import phase_table
from evalsuite.report.gallery import Gallery, Picture
from evalsuite.report.headline import headline_table, standings, unscored
from evalsuite.report.models import (
    Configured,
    architecture_table,
    flags_table,
    models_table,
    serving_key,
)
from evalsuite.report.naming import what
from evalsuite.report.perplexity_runs import (
    Pairing,
    condition_of,
    condition_table,
    pairings,
    pairings_table,
    prefixes_table,
    result_of,
)
from evalsuite.report.pictures import (
    cache_pictures,
    convergence_picture,
    memory_pictures,
    paired_pictures,
    quantization_pictures,
    speed_pictures,
)
from evalsuite.report.provenance import failures_table, runs_table, warnings_table
from evalsuite.report.quantizations import counted_table, recipes_table
from evalsuite.report.quantizations import result_of as quantized
from evalsuite.report.requirements import SMALL_BYTES, needs, requirements_table
from evalsuite.report.section import Section
from evalsuite.report.speed import device_table, latency_table
from evalsuite.report.speed_arms import cache_table, generation_table, modes_of, modes_table
from evalsuite.report.speed_cell import Row, speed_order
from evalsuite.report.speed_rows import speed_rows
from evalsuite.report.tables import Table
from evalsuite.report.vram import serving_of, vram_table
from evalsuite.store.runs import StoredRun
from evalsuite.telemetry.phases import by_phase
from evalsuite.telemetry.samples import load_samples

AnyTable = Table[Any]
LEAST_BYTES = 0.5  # of a weight, in four bits


def sections(runs: Sequence[StoredRun], gallery: Gallery) -> tuple[Section, ...]:
    """The sections that these runs are enough for.

    Args:
        runs: newest first; of several of one spec on one device the newest counts.
    """
    book = Book(runs, gallery)
    made = (
        book.headline(), book.perplexity(), book.comparison(), book.speed(), book.cache(), book.modes(),
        book.memory(), book.requirements(), book.quantization(), book.models(), book.flags(),
        book.failures(), book.provenance(),
    )  # fmt: skip
    return tuple(section for section in made if section.tables or section.pictures)


class Book:
    """The runs of a report, sorted by what they measured; a method a section, which may be empty."""

    def __init__(self, runs: Sequence[StoredRun], gallery: Gallery) -> None:
        self._paths = {run.record.run_id: run.path for run in runs}
        every, runs = runs, newest(runs)
        stands_for = stand_ins(every, runs)
        self._runs, self._gallery = runs, gallery
        self._records = [run.record for run in runs]
        self._lineage = Lineage(self._records, stands_for)
        self._pairings = pairings(self._records, stands_for)
        finished = [run for run in runs if run.record.status == "ok"]
        scored = [run for run in finished if run.record.kind == "ppl"]
        self._conditions = [
            sorted(group, key=lambda run: result_of(run.record).perplexity)
            for group in grouped(scored, lambda run: perplexity_condition(run.record))
        ]
        self._cells = [run for run in runs if run.record.kind == "speed"]
        rows = speed_rows(self._cells, gallery.warnings)
        rows += [Row(run.record) for run in self._cells if run.record.status != "ok"]
        self._rows = sorted(rows, key=speed_order)
        self._footprints = [run for run in finished if run.record.kind == "footprint"]

    def headline(self) -> Section:
        plain = [
            row.record
            for row in self._rows
            if not row.failed and row.spec.serving.moe_expert_cache_size is None
        ]
        tables: list[AnyTable] = []
        scored: list[Record] = []
        for group in self._conditions:
            records = [run.record for run in group]
            scored += records
            tables.append(headline_table(standings(records, plain, self._lineage, self._pairings)))
        tables += [headline_table(rows) for rows in unscored(plain, scored, self._lineage)]
        return Section("headline", "Headline", tuple(tables))

    def perplexity(self) -> Section:
        tables: list[AnyTable] = []
        pictures: list[Picture] = []
        for group in self._conditions:
            records = [run.record for run in group]
            tables.append(condition_table(records))
            if len(result_of(records[0]).prefixes) > 1:
                tables.append(prefixes_table(records))
            pictures += convergence_picture(self._gallery, group, self._lineage)
        note = (
            "Each table holds one text, tokenizer, protocol and number of windows; numbers of two tables are "
            "not to be compared." * (len(self._conditions) > 1)
        )
        return Section("perplexity", "Perplexity", tuple(tables), tuple(pictures), note)

    def comparison(self) -> Section:
        def condition(row: Pairing) -> Hashable:
            if row.engines:
                return condition_of(row.record)
            return row.runs[1], row.result.windows

        groups = grouped(self._pairings, condition)
        for group in groups:
            group.sort(key=lambda row: row.result.delta_ln_ppl)
        return Section(
            "comparison", "Paired comparison", tuple(pairings_table(group) for group in groups),
            tuple(
                picture
                for group in groups
                if not group[0].engines
                for picture in paired_pictures(self._gallery, group, self._paths)
            ),
        )  # fmt: skip

    def speed(self) -> Section:
        tables: list[AnyTable] = []
        pictures: list[Picture] = []
        for rows in grouped(self._rows, _platform):
            workload = rows[0].spec.workload
            where = f"{rows[0].place}, {workload.input_len:,} in, {workload.output_len:,} out"
            finished = [row for row in rows if not row.failed]
            tables.append(_titled(generation_table(rows), where))
            if finished:
                tables.append(_titled(latency_table(finished), where))
            pictures += speed_pictures(self._gallery, finished)
        if across := device_table(_on_several([row for row in self._rows if not row.failed])):
            tables.append(across)
        return Section("speed", "Generation speed", tuple(tables), tuple(pictures))

    def cache(self) -> Section:
        tables: list[AnyTable] = []
        pictures: list[Picture] = []
        for rows in grouped(self._rows, lambda row: (_platform(row), row.model)):
            if len({row.spec.serving.moe_expert_cache_size for row in rows}) > 1:
                tables.append(cache_table(rows))
                pictures += cache_pictures(self._gallery, [row for row in rows if not row.failed])
        return Section("cache", "Expert cache", tuple(tables), tuple(pictures))

    def modes(self) -> Section:
        groups = [found for rows in grouped(self._rows, _platform) if (found := modes_of(rows))]
        tables = tuple(_titled(modes_table(group), group[0].eager.place) for group in groups)
        return Section("modes", "Eager mode and CUDA graphs", tables)

    def memory(self) -> Section:
        by_id = {run.record.run_id: run for run in self._cells}
        cells = [by_id[row.record.run_id] for row in self._rows if not row.failed]
        runs = [*self._footprints, *cells]
        if not runs:
            return Section("memory", "Memory")
        records = [run.record for run in runs]
        tables: list[AnyTable] = [
            _titled(vram_table(group), device_of(group[0])) for group in grouped(records, device_of)
        ]
        pictures: list[Picture] = []
        drawn: set[tuple[str, str]] = set()
        # where a model has no footprint, the cell that saw the longest load stands in
        for run in [*self._footprints, *sorted(cells, key=lambda cell: -_load_s(cell))]:
            key = (model_of(run.record), device_of(run.record))
            if run.record.telemetry and (run.record.kind == "footprint" or key not in drawn):
                drawn.add(key)
                pictures += memory_pictures(self._gallery, run)
        for run in self._footprints:
            if run.record.telemetry is None:
                continue
            try:
                samples = load_samples(run.path)
            except StorageError as error:
                self._gallery.warnings.append(f"no phases of {run.record.run_id}: {error.what}")
                continue
            phases = by_phase(samples, run.record.telemetry.phases)
            said = what(run.record).removeprefix("footprint, ")
            tables.append(_titled(phase_table(run.record, phases), said))
        return Section("memory", "Memory", tuple(tables), tuple(pictures))

    def requirements(self) -> Section:
        tables: list[AnyTable] = []
        served = [row.record for row in self._rows] or [run.record for run in self._footprints]
        for runs in grouped(served, model_of):
            on_gpus = [run for run in runs if run.machine.gpus and run.spec["workload"]["concurrency"] == 1]
            on_gpus = [run for run in on_gpus if not run.beside] or on_gpus
            folder, facts = _folder(runs[0]), runs[0].model
            if folder is None or facts is None or facts.parameters * LEAST_BYTES < SMALL_BYTES:
                continue
            from evalsuite.engines.geometry import read_geometry  # torch and transformers load for it

            try:
                geometry = read_geometry(find_checkpoint(str(folder), weights=False), "bfloat16")
            except ModelError as error:
                self._gallery.warnings.append(f"no GPU requirements: {error.what}")
                continue
            tables.append(requirements_table(model_of(runs[0]), geometry, needs(geometry, on_gpus)))
        return Section("requirements", "GPU requirements", tuple(tables))

    def quantization(self) -> Section:
        done = [r for r in self._records if r.kind == "quantize" and r.status == "ok"]
        tables: list[AnyTable] = []
        pictures: list[Picture] = []
        for group in grouped(done, lambda record: quantized(record).source_fingerprint):
            group.sort(key=lambda record: quantized(record).total.relative_error or 0)
            tables += [recipes_table(group), counted_table(group)]
            pictures += quantization_pictures(self._gallery, group)
        return Section("quantization", "Quantization", tuple(tables), tuple(pictures))

    def models(self) -> Section:
        loaded = [r for r in self._records if r.model is not None and r.kind != "compare"]
        by_fingerprint = {r.model.fingerprint: r for r in reversed(loaded) if r.model}
        records = sorted(by_fingerprint.values(), key=model_of)
        if not records:
            return Section("models", "Models")
        tables: list[AnyTable] = [models_table(records)]
        folders = [(record, _folder(record)) for record in records]
        names = checkpoint_names(records)
        configured = [
            Configured(names[record.run_id], find_checkpoint(str(folder), weights=False).config())
            for record, folder in folders
            if folder is not None
        ]
        if configured:
            tables.append(architecture_table(configured))
        return Section("models", "Models", tuple(tables))

    def flags(self) -> Section:
        served = [r for r in self._records if r.kind in ("speed", "footprint")]
        one_each = {serving_key(record): record for record in reversed(served)}
        records = sorted(one_each.values(), key=serving_key)
        return Section("flags", "Arguments as probed", (flags_table(records),) if records else ())

    def failures(self) -> Section:
        failed = [r for r in self._records if r.status != "ok"]
        return Section("failures", "Runs without a number", (failures_table(failed),) if failed else ())

    def provenance(self) -> Section:
        tables: list[AnyTable] = [runs_table(self._records)]
        warnings = warnings_table(self._records)
        return Section("provenance", "Provenance", (*tables, *([warnings] if warnings.rows else [])))


def _on_several(rows: Sequence[Row]) -> list[Row]:
    """Cells that were measured on more than one kind of device."""
    groups = grouped(rows, _cell)
    return [row for group in groups if len({row.device for row in group}) > 1 for row in group]


def _cell(row: Row) -> Hashable:
    serving = row.spec.serving.model_copy(update={"gpus": ()})
    return row.spec.model_copy(update={"serving": serving}).model_dump_json()


def _load_s(run: StoredRun) -> float:
    """How long its telemetry saw it load."""
    phases = run.record.telemetry.phases if run.record.telemetry else ()
    return sum(phase.stop_s - phase.start_s for phase in phases if phase.name == "load")


def _platform(row: Row) -> Hashable:
    """Equal for cells of one table: devices, engine and lengths; what else differs is a column."""
    workload = row.spec.workload
    return row.place, row.record.machine.gpu_driver, workload.corpus, workload.input_len, workload.output_len


def _titled(table: AnyTable, where: str) -> AnyTable:
    return replace(table, title=f"{table.title}: {where}")


def _folder(record: Record) -> Path | None:
    """The folder that the run's model was read from, where it is here and unchanged."""
    model = str(record.spec.get("model", ""))
    place = Path(model) if model != DEMO else None
    if place is not None and not (place / "config.json").is_file():
        return None
    try:
        dummy = record.kind in ("speed", "footprint") and serving_of(record).load_format == "dummy"
        checkpoint = find_checkpoint(model, weights=not dummy)
    except ModelError:
        return None
    same = record.model is not None and checkpoint.fingerprint() == record.model.fingerprint
    return checkpoint.folder if same else None
