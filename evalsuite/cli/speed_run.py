"""What `speed` does once its flags are axes: the forecast or the sweep, its tables and its pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evalsuite.cli.show import Screen
from evalsuite.cluster.connect import ClusterChoice
from evalsuite.cluster.speed import run_sweep_on
from evalsuite.core.bandwidth import Bandwidth
from evalsuite.core.errors import MeasurementError
from evalsuite.core.record import Machine
from evalsuite.core.spec import Serving, SpeedSpec, Workload
from evalsuite.core.sweep import Axes, cells, label, reference_cells
from evalsuite.data.corpora import load_corpus
from evalsuite.data.models import Checkpoint, find_checkpoint
from evalsuite.engines.bandwidth import measure_bandwidth
from evalsuite.report.forecast import forecast_table
from evalsuite.report.speed import (
    device_table,
    failure_table,
    graph_ratios,
    latency_table,
    load_table,
    speed_table,
)
from evalsuite.report.speed_cell import Row, mode_pairs
from evalsuite.report.speed_plots import cache_curves, mode_bars
from evalsuite.report.speed_rows import rows_of_other_devices, speed_rows
from evalsuite.report.tables import Table
from evalsuite.run.forecast import available_modes, fits, forecast, refuse_impossible
from evalsuite.run.options import Sweep
from evalsuite.run.perplexity import Finished
from evalsuite.run.speed import Plan, run_sweep
from evalsuite.run.subject import Subject, check_cache_sizes, prepare
from evalsuite.store.runs import ResumeMode, RunStore

ON_THE_BUILT_IN_MODEL = (
    "No model was named: this is the built-in one, which shows how the command works. "
    "To measure your own: hlwq-eval speed MODEL"
)


@dataclass(frozen=True)
class Place:
    """Where cells run: here, or on a cluster, whose first node then stands for `machine`."""

    machine: Machine
    cluster: ClusterChoice | None


def measure(
    screen: Screen,
    place: Place,
    sweep: Sweep,
    results: Path,
    *,
    dry_run: bool,
    mode: ResumeMode,
    no_model: bool,
) -> None:
    """Check, then forecast or run, and show.

    Raises:
        UsageError: before anything loads.
        MeasurementError: some cells came to nothing; all records and tables are there.
    """
    axes, serving, workload = sweep.axes, sweep.serving, sweep.workload
    if no_model:
        screen.note(ON_THE_BUILT_IN_MODEL)
    for model in axes.models:  # before a text is downloaded for it
        checkpoint = find_checkpoint(model, weights=serving.load_format != "dummy")
        if serving.server_url is not None and not dry_run:
            from evalsuite.engines.vllm_server import require_server

            require_server(checkpoint, serving.server_url)
    corpus = load_corpus(workload.corpus)
    subjects = {model: prepare(model, serving, workload, corpus) for model in axes.models}
    for note in check_cache_sizes(subjects[axes.models[0]].checkpoint, axes.cache_sizes):
        screen.warn(note)
    axes = available_modes(sweep, _checkpoints(subjects))
    chosen, store = cells(axes, serving, workload), RunStore(results)
    machine = place.machine
    if place.cluster is None:
        refuse_impossible(chosen, subjects, machine)  # a node does it for itself
    chosen += _reference(screen, axes, serving, workload, subjects, machine)
    if dry_run:
        bandwidths: dict[int | None, Bandwidth] = {}

        def bandwidth_of(gpu: int | None) -> Bandwidth:
            if gpu not in bandwidths:
                bandwidths[gpu] = measure_bandwidth(gpu)
            return bandwidths[gpu]

        found = forecast(chosen, _checkpoints(subjects), machine, bandwidth_of)
        screen.table(forecast_table([(label(one.cell), one) for one in found]))
        screen.document([one.as_dict() for one in found])
        return
    progress = LiveSweep(screen)
    plan = Plan(store, subjects, workload.seed, mode, progress)
    cluster = place.cluster
    by_kind = [run_sweep(plan, chosen)] if cluster is None else run_sweep_on(cluster, plan, chosen, corpus)
    _show(screen, store, by_kind)
    finished = [one for kind in by_kind for one in kind]
    screen.document([{"path": str(one.path), **one.record.model_dump(mode="json")} for one in finished])
    failed = sum(one.record.status != "ok" for one in finished)
    if failed:
        raise MeasurementError(
            f"{failed} of {len(finished)} cells came to nothing.",
            todo="read the table of them above; the same command tries them again.",
        )


def _checkpoints(subjects: dict[str, Subject]) -> dict[str, Checkpoint]:
    return {model: subject.checkpoint for model, subject in subjects.items()}


def _reference(
    screen: Screen,
    axes: Axes,
    serving: Serving,
    workload: Workload,
    subjects: dict[str, Subject],
    machine: Machine,
) -> list[SpeedSpec]:
    """Uncached cells, for the tokens of the cached ones; none where the whole model does not fit."""
    added = reference_cells(axes, serving, workload)
    if not added:
        return []
    if not all(fits(cell, subjects[cell.model].checkpoint, machine) is not False for cell in added):
        screen.warn("tokens are compared with no uncached run: without a cache the model does not fit here")
        return []
    screen.note("an uncached run is added, whose tokens those of the cached ones are held against")
    return added


class LiveSweep:
    """A line for each stage and each outcome."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen

    def phase(self, text: str) -> None:
        self._screen.note(f"{text} …")

    def cell(self, done: int, total: int, text: str) -> None:
        self._screen.error.print(f"[{done} of {total}] {text}", markup=False)


def _show(screen: Screen, store: RunStore, by_kind: Sequence[Sequence[Finished]]) -> None:
    """Args: by_kind: the cells of each kind of GPU, whose tokens and modes are compared among themselves."""
    rows = [row for kind in by_kind for row in speed_rows(kind)]
    finished = [one for kind in by_kind for one in kind]
    everywhere = [*rows, *rows_of_other_devices(store, rows)]
    tables: list[Table[Any]] = []
    if rows:
        tables += [speed_table(rows), latency_table(rows), load_table(rows)]
        if table := device_table(everywhere):
            tables.append(table)
    failed = [one.record for one in finished if one.record.status != "ok"]
    if failed:
        tables.append(failure_table([(label(SpeedSpec.model_validate(r.spec)), r) for r in failed]))
    for table in tables:
        screen.table(table)
    for warning in dict.fromkeys(warning for one in finished for warning in one.record.warnings):
        screen.warn(warning)
    if not rows:
        return
    folder = finished[0].path.parent
    written = folder / "speed.md"
    written.write_text(
        "\n\n".join(f"## {t.title}\n\n{t.to_markdown()}" for t in tables) + "\n", encoding="utf-8"
    )
    screen.note(f"records: {folder}, a folder for each cell; tables: {written}")
    for picture in _pictures(everywhere, folder):
        screen.note(f"picture: {picture} (and svg)")


def _pictures(rows: Sequence[Row], folder: Path) -> list[Path]:
    """The pictures that these rows are enough for."""
    paths: list[Path] = []
    caption = "Means over repeats with 95 % t-intervals; dotted lines are bounds from measured bandwidths."
    candidate = [row for row in rows if row.spec.model == rows[0].spec.model]
    if len({row.spec.serving.moe_expert_cache_size for row in candidate}) > 1:
        paths.append(cache_curves(candidate, caption, folder / "speed_cache")[0])
    if mode_pairs(rows):
        paths.append(mode_bars(rows, " ".join(graph_ratios(rows)), folder / "speed_modes")[0])
    return paths
