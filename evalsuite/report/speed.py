"""The tables of a speed sweep: what was measured, on which GPUs, and what failed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from evalsuite.core.record import Record, Status
from evalsuite.core.spec import SpeedSpec
from evalsuite.core.speed import Estimate, SpeedResult
from evalsuite.report.apart import checkpoint_names
from evalsuite.report.choose import device_of, model_of
from evalsuite.report.perplexity import plus_minus
from evalsuite.report.tables import NOT_MEASURED, Cell, Column, Table

UNKNOWN = "—"  # of a cell that failed early, or that was on no GPU
GRAPHS_MATTER = 1.2  # times faster: then the caption says so
ENDINGS: dict[Status, str] = {
    "oom": "out of memory", "timeout": "timed out", "failed": "failed", "interrupted": "interrupted",
    "running": "unfinished",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One finished cell, or one that came to nothing, which has no `result`.

    Attributes:
        verdict: what binds it.
        agreement: share of tokens before the first difference from the uncached arm of the same model; None
            where there is no such arm, and for that arm itself, which `is_reference`.
    """

    record: Record
    verdict: str = ""
    agreement: float | None = None
    is_reference: bool = False

    @property
    def spec(self) -> SpeedSpec:
        return SpeedSpec.model_validate(self.record.spec)

    @property
    def result(self) -> SpeedResult:
        assert isinstance(self.record.results, SpeedResult)
        return self.record.results

    @property
    def failed(self) -> bool:
        return self.record.status != "ok"

    @property
    def model(self) -> str:
        return model_of(self.record)

    @property
    def mode(self) -> str:
        asked = "eager" if self.spec.serving.enforce_eager else "graphs"
        return str(self.record.engaged.get("mode", asked))

    @property
    def cached(self) -> bool:
        return self.spec.serving.moe_expert_cache_size is not None

    @property
    def routing(self) -> str:
        return routing_words(self.spec.serving.moe_routing)

    @property
    def device(self) -> str:
        return device_of(self.record)


@dataclass(frozen=True)
class Setting:
    """What a cell was asked for: a column where it varies, a part of the caption where it does not."""

    title: str
    get: Callable[[Row], str]
    sentence: Callable[[str], str] | None


def _cache_sentence(size: str) -> str:
    return "no expert cache" if size == "all" else f"a cache of {size} experts a layer"


def routing_words(routing: str) -> str:
    """Who chooses the experts, as a column has it."""
    law, _, exponent = routing.partition(":")
    return {"model": "by the model", "uniform_random": "uniform random"}.get(law, f"Zipf {exponent}")


def _routing_sentence(routing: str) -> str:
    if routing == "by the model":
        return ""
    exponent = routing.partition("Zipf ")[2]
    law = f"by Zipf's law with exponent {exponent}" if exponent else "uniformly at random"
    return f"experts drawn {law}"


SETTINGS = (
    Setting("cache", lambda r: slots(r.spec), _cache_sentence),
    Setting("mode", lambda r: r.mode, lambda mode: "mode unknown" if mode == "unknown" else mode),
    Setting(
        "policy",
        lambda r: r.spec.serving.moe_expert_cache_policy if r.cached else UNKNOWN,
        "policy {}".format,
    ),
    Setting("store", lambda r: r.spec.serving.moe_expert_store if r.cached else UNKNOWN, "store {}".format),
    Setting("routing", lambda r: r.routing, _routing_sentence),
    Setting("on", lambda r: r.device, "on {}".format),
    Setting("GPU", lambda r: "+".join(map(str, r.spec.serving.gpus)) or UNKNOWN, None),
    Setting("tensor parallel", lambda r: str(r.spec.serving.tensor_parallel_size), None),
    Setting("concurrency", lambda r: str(r.spec.workload.concurrency), "concurrency {}".format),
    Setting("engine", lambda r: str(r.record.engaged.get("engine", "unknown")), "engine {}".format),
    Setting("dtype", lambda r: r.record.model.dtype if r.record.model else UNKNOWN, "{}".format),
    Setting("prompt", lambda r: f"{r.spec.workload.input_len:,}", "{} prompt tokens".format),
    Setting("output", lambda r: f"{r.spec.workload.output_len:,}", "{} output tokens".format),
    Setting("repeats", lambda r: str(r.spec.workload.repeats), "{} repeats".format),
)
ONLY_TO_TELL_APART = ("GPU", "repeats")  # columns where rows would otherwise read the same


def speed_order(row: Row) -> tuple[Any, ...]:
    """Sorts cells by model, device, mode and concurrency, and by cache size, every expert last."""
    serving, concurrency = row.spec.serving, row.spec.workload.concurrency
    size, how = serving.moe_expert_cache_size, (serving.moe_expert_store, serving.moe_expert_cache_policy)
    return row.model, row.device, row.mode, serving.moe_routing, concurrency, size is None, how, size or 0


def slots(spec: SpeedSpec) -> str:
    size = spec.serving.moe_expert_cache_size
    return "all" if size is None else str(size)


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
        "decode: 1/TPOT of one sequence, ± half the 95 % t-interval over repeats. Bound: bytes that a token "
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


def _settings(rows: Sequence[Row]) -> tuple[Setting, ...]:
    """All of them, models of one name told apart."""
    names = checkpoint_names([row.record for row in rows])
    return Setting("model", lambda r: names[r.record.run_id], "{}".format), *SETTINGS


def settings_of(rows: Sequence[Row]) -> tuple[list[Column[Row]], str]:
    """Columns for settings that vary, the model where none does; and a sentence on those that do not."""
    settings = _settings(rows)
    values = {setting.title: {setting.get(row) for row in rows} - {UNKNOWN} for setting in settings}
    varying = [s for s in settings if len(values[s.title]) > 1]
    for title in ONLY_TO_TELL_APART:
        others = [s for s in varying if s.title != title]
        if len({tuple(s.get(row) for s in others) for row in rows}) == len(rows):
            varying = others
    columns = [Column[Row](s.title, s.get, label=True) for s in varying]
    columns = columns or [Column[Row]("model", lambda r: r.model, label=True)]
    shared = [
        s.sentence(" or ".join(sorted(values[s.title])))
        for s in settings
        if s.sentence and values[s.title] and s not in varying
    ]
    said = ", ".join(sentence for sentence in shared if sentence)
    if "model" in {s.title for s in varying}:  # else it comes first, and keeps its name
        said = said[:1].upper() + said[1:]
    return columns, f"{said}." if said else ""


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


def mode_pairs(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Cells in eager mode, each with its sibling that differs in having CUDA graphs alone."""

    def key(row: Row) -> str:
        serving = row.spec.serving.model_copy(update={"enforce_eager": False})
        return row.device + row.spec.model_copy(update={"serving": serving}).model_dump_json()

    graphs = {key(row): row for row in rows if not row.spec.serving.enforce_eager}
    return [(row, graphs[key(row)]) for row in rows if row.spec.serving.enforce_eager and key(row) in graphs]


def device_table(rows: Sequence[Row]) -> Table[list[Row]] | None:
    """Decode speed with a column for each GPU model; None where there is only one."""
    devices = list(dict.fromkeys(row.device for row in rows))
    if len(devices) < 2:
        return None
    by_cell: dict[str, list[Row]] = {}
    for row in rows:
        serving = row.spec.serving.model_copy(update={"gpus": ()})
        by_cell.setdefault(row.spec.model_copy(update={"serving": serving}).model_dump_json(), []).append(row)
    skipped = ("on", "GPU")
    settings = [
        s for s in _settings(rows) if s.title not in skipped and len({s.get(r) for r in rows} - {UNKNOWN}) > 1
    ]

    def speed(device: str) -> Callable[[list[Row]], Cell | str]:
        def get(cell: list[Row]) -> Cell | str:
            found = [row for row in cell if row.device == device]
            return _pm(found[0].result.decode_tokens_per_s) if found else NOT_MEASURED

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
