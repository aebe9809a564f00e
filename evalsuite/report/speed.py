"""The tables of a speed sweep: what was measured, on which GPUs, and what failed."""

from collections.abc import Callable, Sequence

from evalsuite.core.record import Record, Status
from evalsuite.core.speed import Estimate
from evalsuite.report.perplexity import plus_minus
from evalsuite.report.speed_cell import UNKNOWN, Row, Setting, mode_pairs, settings_for, settings_of, slots
from evalsuite.report.tables import NOT_MEASURED, Cell, Column, Table

GRAPHS_MATTER = 1.2  # times faster: then the caption says so
ENDINGS: dict[Status, str] = {
    "oom": "out of memory", "timeout": "timed out", "failed": "failed", "interrupted": "interrupted",
    "running": "unfinished",
}  # fmt: skip


def speed_table(rows: Sequence[Row], *, ratios: bool = True) -> Table[Row]:
    """Decode speed beside its bound, a row for each cell; what all cells share stands in the caption.

    Args:
        ratios: say in the caption how much faster CUDA graphs are than eager mode.
    """
    settings, shared = settings_of(rows)
    columns = [
        *settings,
        Column[Row]("decode", decode_cell, "tok/s", "higher"),
        Column[Row]("bound", bound_cell, "tok/s"),
        Column[Row]("reached", share_cell, "%"),
    ]
    optional = [
        Column[Row]("what binds it", lambda r: r.verdict or NOT_MEASURED),
        Column[Row]("hits", hit_cell, "%", "higher"),
        Column[Row]("same tokens", agreement_cell, "%", "higher"),
    ]
    columns += [column for column in optional if any(column.get(row) != NOT_MEASURED for row in rows)]
    parts = [
        *(graph_ratios(rows) if ratios else ()),
        shared,
        "decode: 1/TPOT of one sequence, ± half the 95 % t-interval over repeats. Bound: bytes that a step "
        "needs over measured bandwidths. Overhead: time that memory, transfers and compute do not explain.",
    ]
    if any(not row.is_reference and row.agreement is not None for row in rows):
        parts.append("Same tokens: those before the first difference from the model's uncached arm.")
    if any(row.spec.serving.load_format == "dummy" for row in rows):
        parts.append("Dummy weights: which experts they choose is not a trained model's.")
    return Table("Speed", columns, rows, " ".join(filter(None, parts)), runs_of)


def latency_table(rows: Sequence[Row]) -> Table[Row]:
    """Times of first and later tokens, and throughput of all requests together."""
    settings, shared = settings_of(rows)
    columns = [
        *settings,
        Column[Row]("TTFT", lambda r: _pm(r.result.ttft_s, 1000), "ms", "lower"),
        Column[Row]("ITL p50", lambda r: _ms(r.result.itl_p50_s), "ms", "lower"),
        Column[Row]("p90", lambda r: _ms(r.result.itl_p90_s), "ms", "lower"),
        Column[Row]("p99", lambda r: _ms(r.result.itl_p99_s), "ms", "lower"),
        Column[Row]("output", lambda r: _pm(r.result.output_tokens_per_s), "tok/s", "higher"),
        Column[Row]("prefill", lambda r: _pm(r.result.prefill_tokens_per_s), "tok/s", "higher"),
    ]
    return Table(
        "Latency and throughput",
        columns,
        rows,
        f"{shared} Output: tokens of all requests from first submission to last token. Prefill: prompt "
        "tokens to the last first token.",
        runs_of,
    )


def load_table(rows: Sequence[Row]) -> Table[Row]:
    """How long loading took, in the engine's own parts; a part that it does not report shows a dash."""
    settings, shared = settings_of(rows)
    columns = [
        *settings,
        Column[Row]("load", lambda r: _seconds(r.result.load.total_s), "s", "lower"),
        Column[Row]("weights", lambda r: _seconds(r.result.load.weights_s), "s", "lower"),
        Column[Row]("compile", lambda r: _seconds(r.result.load.compile_s), "s", "lower"),
        Column[Row]("warm-up", lambda r: _seconds(r.result.load.warmup_s), "s", "lower"),
        Column[Row]("page cache", _resident),
    ]
    return Table(
        "Loading",
        columns,
        rows,
        f"{shared} Cells that differ in cache size or concurrency may share one load. Page cache: share of "
        "the checkpoint in it before; a load is warm from one half, else cold.",
        runs_of,
    )


def graph_ratios(rows: Sequence[Row]) -> list[str]:
    """A sentence for every pair of cells that differ in eager and graphs alone."""
    found: list[str] = []
    for eager, graphs in mode_pairs([row for row in rows if not row.failed]):
        ratio = graphs.result.decode_tokens_per_s.mean / eager.result.decode_tokens_per_s.mean
        said = f"{ratio:.3g}× as fast as eager"
        if ratio < GRAPHS_MATTER:
            said += ", so launches are not what binds it"
        cache = "" if slots(eager.spec) == "all" else f"cache {slots(eager.spec)}, "
        where = f"{eager.model}, {cache}concurrency {eager.spec.workload.concurrency}, {eager.device}"
        found.append(f"CUDA graphs are {said} ({where}).")
    return found


def device_table(rows: Sequence[Row]) -> Table[list[Row]] | None:
    """Decode speed with a column for each GPU model; None where there is only one."""
    devices = list(dict.fromkeys(row.device for row in rows))
    if len(devices) < 2:
        return None
    by_cell: dict[str, list[Row]] = {}
    for row in rows:
        serving = row.spec.serving.model_copy(update={"gpus": ()})
        by_cell.setdefault(row.spec.model_copy(update={"serving": serving}).model_dump_json(), []).append(row)
    skipped = ("on", "GPU", "GPUs beside")
    settings = [
        s
        for s in settings_for(rows)
        if s.title not in skipped and len({s.get(r) for r in rows} - {UNKNOWN}) > 1
    ]

    def speed(device: str) -> Callable[[list[Row]], Cell | str]:
        def get(cell: list[Row]) -> Cell | str:
            found = [row for row in cell if row.device == device]
            quiet = min(found, key=lambda row: row.record.beside, default=None)
            return NOT_MEASURED if quiet is None else _pm(quiet.result.decode_tokens_per_s)

        return get

    def setting(chosen: Setting) -> Callable[[list[Row]], Cell | str]:
        return lambda cell: chosen.get(cell[0])

    columns = [Column[list[Row]](s.title, setting(s)) for s in settings]
    columns = columns or [Column[list[Row]]("model", lambda cell: cell[0].model)]
    columns += [Column[list[Row]](name, speed(name), "tok/s", "higher") for name in devices]
    return Table(
        "Decode speed by GPU", columns, list(by_cell.values()),
        "1/TPOT of one sequence; ± is half the 95 % t-interval over repeats.",
    )  # fmt: skip


def failure_table(records: Sequence[tuple[str, Record]]) -> Table[tuple[str, Record]]:
    """Cells that came to nothing; a label and a record each."""
    return Table(
        "Cells without a number",
        (
            Column[tuple[str, Record]]("cell", lambda r: r[0], prose=3),
            Column[tuple[str, Record]]("status", lambda r: r[1].status),
            Column[tuple[str, Record]](
                "why", lambda r: " ".join((r[1].error or "").splitlines()[:2]), prose=4
            ),
            Column[tuple[str, Record]]("record", lambda r: r[1].run_id, prose=3),
        ),
        records,
        "Their logs lie beside their records; the same command tries them again.",
    )


def _pm(value: Estimate, scale: float = 1.0) -> str:
    if value.low is None or value.high is None:
        return f"{scale * value.mean:.4g}"
    return plus_minus(scale * value.mean, scale * value.low, scale * value.high)


def runs_of(row: Row) -> tuple[str, ...]:
    return (row.record.run_id,)


def decode_cell(row: Row) -> Cell:
    """Decode tokens/s; of a cell that came to nothing, how it ended."""
    if row.failed:
        return Cell(ENDINGS[row.record.status], "failed")
    return Cell(_pm(row.result.decode_tokens_per_s))


def bound_cell(row: Row) -> Cell:
    if row.failed:
        return NOT_MEASURED
    found = row.result.bound
    return Cell(rate_text(found.tokens_per_s), "derived") if found else NOT_MEASURED


def share_cell(row: Row) -> Cell:
    if row.failed:
        return NOT_MEASURED
    found = row.result.bound
    return Cell(f"{100 * found.share:.2g}", "derived") if found else NOT_MEASURED


def hit_cell(row: Row) -> Cell:
    rate = row.record.expert_cache.hit_rate if row.record.expert_cache else None
    return NOT_MEASURED if rate is None else Cell(f"{100 * rate:.1f}")


def agreement_cell(row: Row) -> Cell:
    if row.is_reference:
        return NOT_MEASURED
    return NOT_MEASURED if row.agreement is None else Cell(f"{100 * row.agreement:.1f}")


def _seconds(value: float | None) -> Cell:
    return NOT_MEASURED if value is None else Cell(f"{value:.1f}")


def _resident(row: Row) -> Cell:
    share = row.result.load.resident_share
    if share is None:
        return NOT_MEASURED
    return Cell(f"{100 * share:.0f} %, {'warm' if share >= 0.5 else 'cold'}")


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:,.0f}"


def rate_text(rate: float) -> str:
    """Three digits, and no exponent."""
    return f"{rate:.3g}" if rate < 999.5 else f"{rate:,.0f}"
