"""The tables of several perplexity runs under one condition: side by side, by prefix, and paired."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import expm1

from evalsuite.core.protocol import PROTOCOLS, WindowProtocol
from evalsuite.core.record import CompareResult, Divergence, PerplexityResult, Prefix, Record
from evalsuite.report.apart import names_apart
from evalsuite.report.choose import (
    compared_runs,
    device_of,
    engine_of,
    grouped,
    perplexity_condition,
    through_two_engines,
)
from evalsuite.report.perplexity import p_text, plus_minus, with_interval
from evalsuite.report.tables import NOT_MEASURED, Cell, Column, Table
from evalsuite.report.varying import settle


def result_of(record: Record) -> PerplexityResult:
    assert isinstance(record.results, PerplexityResult)
    return record.results


def text_of(record: Record) -> str:
    """The text, with its version where it has one."""
    assert record.text is not None
    # the built-in text differs between versions of Python
    source = f" of {record.text.source.rpartition(' of ')[2]}" if record.text.corpus == "builtin" else ""
    return f"{record.text.corpus}{source}"


def protocol_name(protocol: WindowProtocol) -> str:
    """The preset, and where a choice was overridden the window, which the preset does not tell then."""
    window = f" (context {protocol.context}, stride {protocol.stride})"
    return protocol.name + window * (PROTOCOLS.get(protocol.name) != protocol)


def condition_of(record: Record) -> str:
    """Text, protocol and windows of a run or a comparison in a line, for titles."""
    assert record.protocol is not None
    assert isinstance(record.results, PerplexityResult | CompareResult)
    return f"{text_of(record)}, {protocol_name(record.protocol)}, {record.results.windows:,} windows"


def _experts(record: Record) -> str:
    size = record.spec.get("moe_expert_cache_size")
    return "" if size is None else f"{size} a layer"


def _labels(records: Sequence[Record]) -> tuple[Column[Record], ...]:
    names = names_apart(records)
    return (
        Column[Record]("model", lambda r: names[r.run_id], label=True),
        Column[Record]("stored as", lambda r: r.model.stored if r.model else "", label=True),
        Column[Record]("computed in", lambda r: r.model.dtype if r.model else "", label=True),
        Column[Record]("engine", engine_of, label=True),
        Column[Record]("experts on the device", _experts, label=True),
        Column[Record]("on", device_of, label=True),
    )


def condition_table(records: Sequence[Record]) -> Table[Record]:
    """Perplexities that may be compared, a run a row.

    Args:
        records: of one condition.
    """
    labels, shared = settle(_labels(records), records)
    first = records[0]
    assert first.protocol is not None
    result = result_of(first)
    available = f" of {result.windows_available:,}" if result.windows < result.windows_available else ""
    words = any(result_of(record).word_perplexity is not None for record in records)
    columns = [
        *labels,
        Column[Record]("perplexity", _perplexity, better="lower"),
        Column[Record]("bits per byte", lambda r: f"{result_of(r).bits_per_byte:.4f}", better="lower"),
        *([Column[Record]("word perplexity", _words, better="lower")] if words else []),
        Column[Record](
            "scored", lambda r: f"{result_of(r).scored_tokens_per_s:,.0f}", "tokens/s", better="higher"
        ),
    ]
    return Table(
        f"Perplexity: {condition_of(first)}",
        columns,
        records,
        f"{first.protocol.describe()}; {result.windows:,}{available} windows, {result.scored_tokens:,} "
        f"scored tokens. {shared} ± is half the 95 % interval over windows, which is mostly the text's own "
        "variation: models are told apart by paired comparison, not by overlapping intervals.",
        _runs,
    )


def prefixes_table(records: Sequence[Record]) -> Table[Record]:
    """Perplexity of growing prefixes with intervals, a run a row and a prefix a column."""
    labels, shared = settle(_labels(records), records)
    stops = [prefix.stop for prefix in result_of(records[0]).prefixes]

    def at(stop: int) -> Callable[[Record], Cell | str]:
        def get(record: Record) -> Cell | str:
            found = [p for p in result_of(record).prefixes if p.stop == stop]
            return _interval(found[0]) if found else NOT_MEASURED

        return get

    return Table(
        f"By prefix: {condition_of(records[0])}",
        [*labels, *(Column[Record](f"first {stop:,}", at(stop), better="lower") for stop in stops)],
        records,
        f"Perplexity of the first windows of the text. {shared} ± is half the 95 % interval of a "
        "moving-block bootstrap over windows. A prefix holds the shorter ones, so that later columns differ "
        "less says nothing about the text that was not scored.",
        _runs,
    )


@dataclass(frozen=True)
class Pairing:
    """One recorded comparison.

    Attributes:
        record: of the comparison.
        runs: the candidate and the baseline, or the runs that stand for them.
        names: theirs, told apart from the other runs of their condition.
        engines: of one checkpoint, through two engines.
    """

    record: Record
    runs: tuple[str, str]
    names: tuple[str, str]
    engines: bool

    @property
    def result(self) -> CompareResult:
        assert isinstance(self.record.results, CompareResult)
        return self.record.results


def pairings(records: Sequence[Record], stands_for: Mapping[str, str]) -> list[Pairing]:
    """The newest comparison of each pair of runs.

    Args:
        records: newest first.
        stands_for: see `evalsuite.report.choose.stand_ins`.
    """
    found: dict[tuple[str, str], Record] = {}
    for record in records:
        if isinstance(record.results, CompareResult):
            found.setdefault(compared_runs(record.results, stands_for), record)
    names = _run_names(records, [run for pair in found for run in pair])
    return [
        Pairing(record, pair, (names[pair[0]], names[pair[1]]), through_two_engines(pair, records))
        for pair, record in found.items()
    ]


def _run_names(records: Sequence[Record], runs: Sequence[str]) -> dict[str, str]:
    """Names of the perplexity runs among `records`, and of those of `runs` that are not there."""
    scored = [record for record in records if isinstance(record.results, PerplexityResult)]
    names: dict[str, str] = {}
    for group in grouped(scored, perplexity_condition):
        names |= names_apart(group)
    absent = [run for run in dict.fromkeys(runs) if run not in names]
    taken = Counter([*names.values(), *(run.partition("/")[0] for run in absent)])
    for run in absent:
        model, _, own = run.partition("/")
        names[run] = model if taken[model] == 1 else f"{model} ({own})"
    return names


def pairings_table(rows: Sequence[Pairing]) -> Table[Pairing]:
    """Δ ln PPL, divergence and agreement, a pair of runs a row.

    Args:
        rows: of one condition, against one baseline; or each against its own weights through another engine.
    """
    about = "engines" if rows[0].engines else rows[0].names[1]
    labels, shared = settle(
        (
            Column[Pairing]("model", lambda p: p.names[0], label=True),
            Column[Pairing]("against", lambda p: p.names[1], label=True),
        ),
        rows,
    )
    result = rows[0].result
    absent = dict.fromkeys(p.result.divergence_absent for p in rows if p.result.divergence_absent)
    return Table(
        f"Paired comparison: {about}, {condition_of(rows[0].record)}",
        [
            *labels,
            Column[Pairing]("Δ ln PPL", _delta, better="lower"),
            Column[Pairing]("PPL changes by", _percent, "%", "lower"),
            Column[Pairing]("p", lambda p: p_text(p.result.p_value).removeprefix("p ").removeprefix("= ")),
            Column[Pairing]("KL mean", _kl(lambda d: f"{d.mean:.5f}"), "nats", "lower"),
            Column[Pairing]("KL p99", _kl(lambda d: f"{d.p99:.3f}"), "nats", "lower"),
            Column[Pairing]("same top token", _kl(_top1), "%", "higher"),
        ],
        rows,
        " ".join(
            (
                f"{result.scored_tokens:,} scored tokens, paired by window, so that the text's own variation "
                f"cancels; 95 % intervals. {shared} A change whose interval holds 0 is not shown to be one.",
                *(f"No divergence: {reason}." for reason in absent),
            )
        ),
        lambda p: (p.record.run_id, p.result.candidate_run, p.result.baseline_run),
    )


def _delta(row: Pairing) -> str:
    return with_interval(row.result.delta_ln_ppl, row.result.low, row.result.high)


def _percent(row: Pairing) -> Cell:
    """exp(Δ ln PPL) − 1; for the small changes of interest, Δ ln PPL itself."""
    result = row.result
    low, high = (None if end is None else 100 * expm1(end) for end in (result.low, result.high))
    return Cell(plus_minus(100 * expm1(result.delta_ln_ppl), low, high), "derived")


def _kl(read: Callable[[Divergence], str]) -> Callable[[Pairing], Cell]:
    def get(row: Pairing) -> Cell:
        found = row.result.divergence
        return Cell(read(found)) if found else NOT_MEASURED

    return get


def _top1(found: Divergence) -> str:
    low, high = found.top1_agreement_low, found.top1_agreement_high
    if low is None or high is None:
        return f"{100 * found.top1_agreement:.2f}"
    return plus_minus(100 * found.top1_agreement, 100 * low, 100 * high)


def _perplexity(record: Record) -> str:
    result = result_of(record)
    return plus_minus(result.perplexity, result.low, result.high)


def _interval(prefix: Prefix) -> str:
    return plus_minus(prefix.perplexity, prefix.low, prefix.high)


def _words(record: Record) -> Cell:
    value = result_of(record).word_perplexity
    return NOT_MEASURED if value is None else Cell(f"{value:.4g}")


def _runs(record: Record) -> tuple[str, ...]:
    return (record.run_id,)
