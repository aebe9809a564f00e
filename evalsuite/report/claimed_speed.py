"""Decode speeds that a card claims, beside those measured here: a row for each model and cache size.

A card's number stands as the card has it, once for each that it gives. What was measured is the decode speed
of one sequence, with a column for each mode on each device, because the two modes are two numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from evalsuite.report.choose import bears_witness, environment_of, newest
from evalsuite.report.claim_evidence import is_of
from evalsuite.report.claims import Claim, Claims
from evalsuite.report.speed import decode_cell, runs_of
from evalsuite.report.speed_cell import Row
from evalsuite.report.tables import NOT_MEASURED, Cell, Column, Table
from evalsuite.store.runs import StoredRun

METRIC = "speed"
MODES = ("eager", "graphs")


@dataclass(frozen=True)
class Arm:
    """One model with one cache size: what the card says of it, and the cells that measured it."""

    title: str
    claims: tuple[Claim, ...]
    rows: tuple[Row, ...]

    def claimed(self, with_gpu: bool) -> Cell:
        said = dict.fromkeys(
            f"{'~' if claim.approximate else ''}{claim.value:g}"
            + (f" ({claim.gpu})" if with_gpu and claim.gpu else "")
            for claim in self.claims
            if isinstance(claim.value, float)
        )
        return Cell("; ".join(said), "claimed")


def one_sequence(runs: Sequence[StoredRun]) -> list[Row]:
    """Undisturbed cells with one request at a time, the newest of each spec on each kind of device.

    Args:
        runs: newest first.
    """
    cells = [run for run in newest(runs) if run.record.kind == "speed" and bears_witness(run.record)]
    return [row for row in (Row(run.record) for run in cells) if row.result.concurrency == 1]


def claimed_speed_table(claims: Claims, rows: Sequence[Row]) -> Table[Arm]:
    """What the card claims and what was measured of models that have any measured row."""
    arms: dict[tuple[str, int | str], list[Claim]] = {}
    for claim in claims.claim:
        if claim.metric == METRIC and claim.cache is not None and isinstance(claim.value, float):
            arms.setdefault((claim.model, claim.cache), []).append(claim)
    made: list[Arm] = []
    for (model, cache), said in sorted(arms.items(), key=lambda arm: (arm[0][0], _slots(arm[0][1]))):
        subject = claims.models[model]
        ours = [row for row in rows if is_of(row.record, subject)]
        here = tuple(
            row
            for row in ours
            if _slots(row.spec.serving.moe_expert_cache_size) == _slots(cache) and _plain(row)
        )
        if ours:
            size = "all experts resident" if cache == "all" else f"{cache} experts cached"
            made.append(Arm(f"{subject.stored}, {size}", tuple(said), here))
    measured = [row for arm in made for row in arm.rows]
    gpus = {claim.gpu for arm in made for claim in arm.claims} - {None}
    on = f", {gpus.copy().pop()}" if len(gpus) == 1 else ""
    columns: list[Column[Arm]] = [
        Column("model", lambda arm: arm.title, label=True),
        Column(f"the card{on}", lambda arm: arm.claimed(len(gpus) > 1), "tok/s", label=True),
    ]
    columns += [
        Column(f"{mode}, {device}", _decode(device, mode), "tok/s", "higher")
        for device in sorted({row.device for row in measured})
        for mode in MODES
        if any((row.device, row.mode) == (device, mode) for row in measured)
    ]
    caption = "Decode speed of one sequence. "
    if any(row.spec.serving.load_format == "dummy" for row in measured):
        caption += "Measured on dummy weights in the model's geometry. "
    if any(row.spec.serving.moe_routing == "uniform_random" for row in measured):
        caption += "Experts drawn uniformly at random, so that a cache has no locality to use. "
    if any(row.spec.serving.moe_expert_cache_size is not None for row in measured):
        caption += "Experts that are not cached are in page-locked memory. "
    return Table("Claimed and measured decode speed", columns, made, f"{caption}A dash: not measured.")


def _slots(size: int | str | None) -> int:
    """For sorting and matching: every expert comes last."""
    return size if isinstance(size, int) else 1 << 30


def _plain(row: Row) -> bool:
    """What a claim without conditions is held against: one GPU, experts in memory, no skew, no variables."""
    serving = row.spec.serving
    usual = serving.moe_expert_store == "pinned" and serving.moe_routing in ("model", "uniform_random")
    return usual and serving.tensor_parallel_size == 1 and not environment_of(row.record)


def _decode(device: str, mode: str) -> Callable[[Arm], Cell | str]:
    def get(arm: Arm) -> Cell | str:
        found = [row for row in arm.rows if (row.device, row.mode) == (device, mode)]
        if not found:
            return NOT_MEASURED
        quiet = min(found, key=lambda row: row.record.beside)
        return replace(decode_cell(quiet), runs=runs_of(quiet))

    return get
