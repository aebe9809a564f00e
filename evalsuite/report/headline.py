"""The first table of a card: perplexity, speed, size and memory of each model, and each against its baseline.

A table holds models whose perplexities may be compared. Speeds are of one condition, the one that most of its
models were measured under, and no number is put beside one of another condition: it is a dash instead.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from evalsuite.core.record import PerplexityResult, Record
from evalsuite.core.speed import Estimate, SpeedResult
from evalsuite.core.units import byte_unit
from evalsuite.report.apart import names_apart
from evalsuite.report.choose import Lineage, device_of, grouped, model_of, speed_condition
from evalsuite.report.footprint import gigabytes
from evalsuite.report.perplexity import plus_minus
from evalsuite.report.perplexity_runs import Pairing, condition_of
from evalsuite.report.speed_arms import ratio_of
from evalsuite.report.tables import NOT_MEASURED, Cell, Column, Table
from evalsuite.report.vram import device_peak, engine_numbers, serving_of


@dataclass(frozen=True)
class Standing:
    """One model: its perplexity run, its speed cell, and those of its baseline under the same conditions."""

    perplexity: Record | None
    speed: Record | None
    base_perplexity: Record | None = None
    base_speed: Record | None = None
    pairing: Pairing | None = None

    @property
    def record(self) -> Record:
        found = self.perplexity or self.speed
        assert found is not None
        return found

    @property
    def stored_bytes(self) -> int:
        return self.record.model.stored_bytes if self.record.model else 0


def standings(
    scored: Sequence[Record], cells: Sequence[Record], lineage: Lineage, pairings: Sequence[Pairing]
) -> list[Standing]:
    """A row for each of `scored`, which share a condition, with its speed under the commonest condition.

    Args:
        cells: finished speed cells without an expert cache.
    """
    fingerprints = {record.model.fingerprint for record in scored if record.model}
    mine = chosen_cells([c for c in cells if c.model and c.model.fingerprint in fingerprints])
    by_model = {cell.model.fingerprint: cell for cell in mine if cell.model}
    compared = {pairing.runs: pairing for pairing in pairings}
    rows: list[Standing] = []
    for record in scored:
        base = lineage.baseline(record, scored)
        speed = by_model.get(record.model.fingerprint) if record.model else None
        rows.append(
            Standing(
                record,
                speed,
                base,
                lineage.baseline(speed, mine) if speed else None,
                compared.get((record.run_id, base.run_id)) if base else None,
            )
        )
    return rows


def unscored(cells: Sequence[Record], scored: Sequence[Record], lineage: Lineage) -> list[list[Standing]]:
    """The models that have a speed and no perplexity: by the commonest condition, the rest by others."""
    known = {record.model.fingerprint for record in scored if record.model}
    groups: list[list[Standing]] = []
    while mine := chosen_cells([c for c in cells if c.model and c.model.fingerprint not in known]):
        known |= {cell.model.fingerprint for cell in mine if cell.model}
        groups.append([Standing(None, cell, None, lineage.baseline(cell, mine)) for cell in mine])
    return groups


def chosen_cells(cells: Sequence[Record]) -> list[Record]:
    """Cells of the condition that most models have; of several, one sequence and CUDA graphs come first."""

    def models(group: Sequence[Record]) -> int:
        return len({cell.model.fingerprint for cell in group if cell.model})

    def order(group: Sequence[Record]) -> tuple[int, bool, bool]:
        first = group[0]
        return -models(group), first.spec["workload"]["concurrency"] != 1, serving_of(first).enforce_eager

    groups = grouped(cells, speed_condition)
    found: dict[Hashable, Record] = {}
    for cell in min(groups, key=order) if groups else ():
        assert cell.model is not None
        found.setdefault(cell.model.fingerprint, cell)
    return list(found.values())


def headline_table(rows: Sequence[Standing]) -> Table[Standing]:
    """Perplexity, decode speed, checkpoint, weights on the device and VRAM, each beside its baseline's."""
    names = names_apart([row.record for row in rows])
    largest = max(max(row.stored_bytes, _weights_of(row.speed)) for row in rows)
    unit, size = byte_unit(largest)
    columns = [
        Column[Standing]("perplexity", _perplexity, better="lower"),
        Column[Standing]("Δ ln PPL", _delta, better="lower"),
        Column[Standing]("decode", _decode, "tok/s", "higher"),
        Column[Standing]("of baseline", _speed_ratio, "×", "higher"),
        Column[Standing]("checkpoint", lambda s: _disk(s, size), unit, "lower"),
        Column[Standing]("of baseline", _disk_ratio, "×", "lower"),
        Column[Standing]("weights on the device", lambda s: _weights(s, size), unit, "lower"),
        Column[Standing]("of baseline", _weights_ratio, "×", "lower"),
        Column[Standing]("VRAM peak", _peak, "GB", "lower"),
    ]
    shown = [column for column in columns if any(column.get(row) != NOT_MEASURED for row in rows)]
    scored = next((row.perplexity for row in rows if row.perplexity), None)
    title = (
        f"Headline: {condition_of(scored)}"
        if scored
        else f"Headline: {device_of(rows[0].record)}, no perplexity"
    )
    return Table(
        title, [Column[Standing]("model", lambda s: names[s.record.run_id], label=True), *shown], rows,
        _caption(rows, names),
    )  # fmt: skip


def _caption(rows: Sequence[Standing], names: Mapping[str, str]) -> str:
    parts: list[str] = []
    if any(row.perplexity for row in rows):
        parts.append("Perplexity ± half the 95 % interval over windows.")
    if any(row.pairing for row in rows):
        parts.append("Δ ln PPL is paired by window.")
    cell = next((row.speed for row in rows if row.speed), None)
    if cell is not None:
        workload, mode = cell.spec["workload"], cell.engaged.get("mode", "mode unknown")
        several = serving_of(cell).tensor_parallel_size
        mode = f"{mode}, tensor parallel {several}" if several > 1 else str(mode)
        parts.append(
            f"Decode speed: of one sequence, concurrency {workload['concurrency']}, {mode}, all experts on "
            f"the device, {workload['input_len']:,} prompt and {workload['output_len']:,} output tokens, on "
            f"{device_of(cell)}."
        )
    if named := dict.fromkeys(name for row in rows for name in _base_names(row, names)):
        parts.append(
            f"Baseline: {', '.join(named)}; numbers are compared where text, protocol, workload, device, "
            "driver and libraries agree, else there is a dash."
        )
    if any(row.speed and serving_of(row.speed).load_format == "dummy" for row in rows):
        parts.append("Dummy weights: speed and memory of the geometry, and no perplexity can be measured.")
    if any(_peak(row) != NOT_MEASURED for row in rows):
        parts.append("VRAM peak holds the KV cache that an engine reserves.")
    return " ".join(parts)


def _base_names(row: Standing, names: Mapping[str, str]) -> list[str]:
    """Of a row's baselines; a speed cell of the model that the perplexity's run names is not named again."""
    bases = [base for base in (row.base_perplexity, row.base_speed) if base]
    one_each = {model_of(base): base for base in reversed(bases)}
    return [names.get(base.run_id, model) for model, base in one_each.items()]


def _from(cell: Cell | str, *records: Record | None) -> Cell:
    """The cell with the runs that it comes from."""
    whole = Cell(cell) if isinstance(cell, str) else cell
    if whole.origin == "not measured":
        return NOT_MEASURED
    return Cell(whole.text, whole.origin, tuple(record.run_id for record in records if record))


def _perplexity(row: Standing) -> Cell:
    result = row.perplexity.results if row.perplexity else None
    if not isinstance(result, PerplexityResult):
        return NOT_MEASURED
    return _from(plus_minus(result.perplexity, result.low, result.high), row.perplexity)


def _delta(row: Standing) -> Cell:
    if row.pairing is None:
        return NOT_MEASURED
    result = row.pairing.result
    return _from(
        plus_minus(result.delta_ln_ppl, result.low, result.high),
        row.pairing.record, row.perplexity, row.base_perplexity,
    )  # fmt: skip


def _speed(record: Record | None) -> Estimate | None:
    found = record.results if record else None
    return found.decode_tokens_per_s if isinstance(found, SpeedResult) else None


def _decode(row: Standing) -> Cell:
    speed = _speed(row.speed)
    return NOT_MEASURED if speed is None else _from(plus_minus(speed.mean, speed.low, speed.high), row.speed)


def _speed_ratio(row: Standing) -> Cell:
    speed, base = _speed(row.speed), _speed(row.base_speed)
    if speed is None or base is None:
        return NOT_MEASURED
    return _from(ratio_of(speed, base), row.speed, row.base_speed)


def _disk(row: Standing, size: float) -> Cell:
    return _from(f"{row.stored_bytes / size:.3g}", row.record) if row.stored_bytes else NOT_MEASURED


def _disk_ratio(row: Standing) -> Cell:
    base = row.base_perplexity or row.base_speed
    return _ratio(row.stored_bytes, base.model.stored_bytes if base and base.model else 0, row.record, base)


def _weights_of(record: Record | None) -> int:
    return (engine_numbers(record).weights_bytes or 0) if record else 0


def _weights(row: Standing, size: float) -> Cell:
    found = _weights_of(row.speed)
    return _from(f"{found / size:.3g}", row.speed) if found else NOT_MEASURED


def _weights_ratio(row: Standing) -> Cell:
    return _ratio(_weights_of(row.speed), _weights_of(row.base_speed), row.speed, row.base_speed)


def _ratio(value: float, base: float, *records: Record | None) -> Cell:
    if not value or not base:
        return NOT_MEASURED
    return _from(Cell(f"{value / base:.3f}", "derived"), *records)


def _peak(row: Standing) -> Cell:
    return _from(gigabytes(device_peak(row.speed)), row.speed) if row.speed else NOT_MEASURED
