"""Arms of a sweep side by side: everything about each, cache sizes of one model, and eager against graphs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from evalsuite.core.speed import Estimate
from evalsuite.report.footprint import gigabytes
from evalsuite.report.perplexity import plus_minus
from evalsuite.report.speed import (
    agreement_cell,
    bound_cell,
    decode_cell,
    hit_cell,
    rate_text,
    runs_of,
    share_cell,
    speed_table,
)
from evalsuite.report.speed_cell import Row, mode_pairs, settings_of, speed_order
from evalsuite.report.tables import NOT_MEASURED, Cell, Column, Table
from evalsuite.report.vram import device_peak, engine_numbers

WEIGHTS = Column[Row]("weights", lambda r: gigabytes(engine_numbers(r.record).weights_bytes), "GB", "lower")
PEAK = Column[Row]("VRAM peak", lambda r: gigabytes(device_peak(r.record)), "GB", "lower")


def generation_table(rows: Sequence[Row]) -> Table[Row]:
    """What a card's speed table has and ought to have: speed, its bound, loading and memory, a cell a row.

    Args:
        rows: cells that came to nothing among them.
    """
    speed = speed_table(rows, ratios=False)
    load = [
        Column[Row]("load", lambda r: _seconds(r, "total_s"), "s", "lower"),
        Column[Row]("of it weights", lambda r: _seconds(r, "weights_s"), "s", "lower"),
        Column[Row]("compile", lambda r: _seconds(r, "compile_s"), "s", "lower"),
        Column[Row]("warm-up", lambda r: _seconds(r, "warmup_s"), "s", "lower"),
    ]
    there = [column for column in (*load, WEIGHTS, PEAK) if any(column.get(r) != NOT_MEASURED for r in rows)]
    return replace(
        speed,
        title="Generation speed",
        columns=[*speed.columns, *there],
        caption=f"{speed.caption} Load: cells that differ in cache size or concurrency may share one, and "
        "the first on a machine compiles what later ones find. Weights: as the engine counts them on the "
        "device, expert slots included. VRAM peak: of the process tree by NVML; it holds the KV cache that "
        "the engine reserves in advance, and so says little about what the model needs. GB = 10⁹ bytes.",
    )


SAME_TOKENS = (
    " Same tokens: those before the first difference from the uncached arm; less than 100 is another order "
    "of summation or a fault."
)


def cache_table(rows: Sequence[Row]) -> Table[Row]:
    """One model under cache sizes: what each costs and gives, kind by kind, the smallest first.

    Args:
        rows: with at least two sizes, of one device.
    """
    experts = max((r.record.expert_cache.experts for r in rows if r.record.expert_cache), default=None)
    ordered = sorted(rows, key=speed_order)
    settings, shared = settings_of(ordered)
    columns = [
        *sorted(settings, key=lambda c: c.title != "cache"),
        Column[Row]("hits", hit_cell, "%", "higher"),
        Column[Row]("moved a step", _moved, "MB", "lower"),
        Column[Row]("decode", decode_cell, "tok/s", "higher"),
        Column[Row]("bound", bound_cell, "tok/s"),
        Column[Row]("reached", share_cell, "%"),
        WEIGHTS,
        Column[Row]("same tokens", agreement_cell, "%", "higher"),
    ]
    shown = [c for c in columns if c.label or any(c.get(row) != NOT_MEASURED for row in ordered)]
    of = "" if experts is None else f", out of {experts}"
    dummy = any(row.spec.serving.load_format == "dummy" for row in rows)
    compared = any(agreement_cell(row) != NOT_MEASURED for row in ordered)
    return Table(
        f"Expert cache: {ordered[0].model}, {ordered[0].place}",
        shown,
        ordered,
        f"Cache: experts of each layer on the device{of}. {shared} Hits: every distinct expert of a decoding "
        "step counts once. A step gives every sequence a token. Moved: experts copied to the device. Bound: "
        "bytes of a step over measured memory bandwidth, and moved bytes over measured copy bandwidth, one "
        "after the other." + SAME_TOKENS * compared + " Dummy weights: their hit rates are not a trained "
        "model's." * dummy,
        runs_of,
    )


@dataclass(frozen=True)
class Modes:
    """A cell in eager mode and its sibling with CUDA graphs; either may have come to nothing."""

    eager: Row
    graphs: Row


def modes_of(rows: Sequence[Row]) -> list[Modes]:
    return [Modes(*pair) for pair in mode_pairs(rows)]


def modes_table(pairs: Sequence[Modes]) -> Table[Modes]:
    """Eager mode against CUDA graphs, a pair a row, with the ratio."""
    settings, shared = settings_of([pair.eager for pair in pairs])
    labels = [Column[Modes](c.title, _of_eager(c), label=True) for c in settings]
    return Table(
        "Eager mode against CUDA graphs",
        [
            *labels,
            Column[Modes]("eager", lambda p: _from(p.eager), "tok/s", "higher"),
            Column[Modes]("graphs", lambda p: _from(p.graphs), "tok/s", "higher"),
            Column[Modes]("graphs over eager", ratio_cell),
            Column[Modes]("bound", lambda p: bound_cell(p.graphs), "tok/s"),
            Column[Modes]("eager reached", lambda p: share_cell(p.eager), "%"),
            Column[Modes]("graphs reached", lambda p: share_cell(p.graphs), "%"),
        ],
        pairs,
        f"Decode speed of one sequence. {shared.replace('eager, ', '')} All else that was asked for is "
        "equal. The ratio's ± takes the two intervals as independent.",
        lambda p: (p.eager.record.run_id, p.graphs.record.run_id),
    )


def _of_eager(column: Column[Row]) -> Callable[[Modes], Cell | str]:
    return lambda pair: column.get(pair.eager)


def _from(row: Row) -> Cell:
    return replace(decode_cell(row), runs=(row.record.run_id,))


def ratio_cell(pair: Modes) -> Cell:
    if pair.eager.failed or pair.graphs.failed:
        return NOT_MEASURED
    return ratio_of(pair.graphs.result.decode_tokens_per_s, pair.eager.result.decode_tokens_per_s)


def ratio_of(value: Estimate, base: Estimate) -> Cell:
    """``12.3 ± 0.4``: relative half widths added in squares, as those of independent estimates."""
    ratio = value.mean / base.mean
    halves = [
        (end.high - end.low) / 2 / end.mean
        for end in (value, base)
        if end.low is not None and end.high is not None
    ]
    if len(halves) < 2:
        return Cell(f"{ratio:.3g}", "derived")
    half = ratio * math.hypot(*halves)
    return Cell(plus_minus(ratio, ratio - half, ratio + half), "derived")


def _seconds(row: Row, part: str) -> Cell:
    value = None if row.failed else row.result.load.model_dump()[part]
    return NOT_MEASURED if value is None else Cell(f"{value:.1f}")


def _moved(row: Row) -> Cell:
    bound = None if row.failed else row.result.bound
    if bound is None or row.record.expert_cache is None:
        return NOT_MEASURED
    return Cell(rate_text(bound.transfer_bytes_per_token / 1e6))
