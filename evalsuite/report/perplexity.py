"""The tables of a perplexity run and of a comparison."""

from collections.abc import Sequence

from evalsuite.core.cache import CacheCounters
from evalsuite.core.record import CompareResult, PerplexityResult, Prefix, Record
from evalsuite.core.units import decimals_for, duration, si_bytes
from evalsuite.report.tables import NOT_MEASURED, Cell, Column, Table

Pair = tuple[str, Cell | str]


def with_interval(value: float, low: float | None, high: float | None) -> str:
    """``6.56 [6.38, 6.75]``: two digits of the interval's half width decide the rounding."""
    if low is None or high is None:
        return f"{value:.4g}"
    digits = decimals_for((high - low) / 2)
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def plus_minus(value: float, low: float | None, high: float | None) -> str:
    """``6.56 ± 0.09``, for tables with many rows."""
    if low is None or high is None:
        return f"{value:.4g}"
    half = (high - low) / 2
    digits = decimals_for(half)
    return f"{value:.{digits}f} ± {half:.{digits}f}"


def p_text(p: float | None) -> str:
    if p is None:
        return ""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def summary_table(record: Record, result: PerplexityResult) -> Table[Pair]:
    """What one run found, a quantity a row."""
    model, text, memory = record.model, record.text, record.telemetry
    assert model is not None
    assert text is not None
    assert memory is not None
    rows: list[Pair] = [
        ("perplexity, 95 % interval", with_interval(result.perplexity, result.low, result.high)),
        ("nats per token", f"{result.nats / result.scored_tokens:.4f}"),
        ("bits per UTF-8 byte", f"{result.bits_per_byte:.4f}"),
        (
            "word perplexity",
            NOT_MEASURED if result.word_perplexity is None else f"{result.word_perplexity:.4g}",
        ),
        ("windows", f"{result.windows:,} of {result.windows_available:,}"),
        ("scored tokens", f"{result.scored_tokens:,}"),
        ("scored tokens/s", f"{result.scored_tokens_per_s:,.0f}"),
        ("tokens through the model/s", f"{result.forward_tokens_per_s:,.0f}"),
        ("time: load, score", f"{duration(result.load_s)}, {duration(result.scoring_s)}"),
        ("weights on disk", f"{si_bytes(model.stored_bytes)} ({model.stored})"),
        (
            "peak memory of the process",
            NOT_MEASURED if memory.rss_peak_bytes is None else si_bytes(memory.rss_peak_bytes),
        ),
    ]
    if memory.gpu_allocated_peak_bytes is not None:
        rows.append(("peak GPU memory allocated", si_bytes(memory.gpu_allocated_peak_bytes)))
    rows += _cache_rows(record.expert_cache)
    assert record.protocol is not None
    return Table(
        f"{model.name} on {text.corpus}",
        (Column[Pair]("quantity", lambda r: r[0]), Column[Pair]("value", lambda r: r[1])),
        rows,
        f"{record.protocol.describe()}; {text.tokens:,} tokens with the tokenizer of {text.tokenizer}; "
        f"{model.computed} ({model.device_name}).",
    )


def _cache_rows(cache: CacheCounters | None) -> list[Pair]:
    if cache is None:
        return []
    steps = sum(layer.steps for layer in cache.layers)
    return [
        ("experts on the device", f"{cache.size} of {cache.experts} a layer ({cache.policy}, {cache.store})"),
        ("expert cache hits", NOT_MEASURED if cache.hit_rate is None else f"{cache.hit_rate:.1%}"),
        ("steps with more experts than slots", f"{cache.overflow_steps:,} of {steps:,}"),
        ("expert bytes moved", si_bytes(cache.bytes_moved)),
    ]


def prefix_table(result: PerplexityResult) -> Table[Prefix]:
    """Perplexity of growing prefixes, as model cards print it, here with intervals."""
    return Table(
        "By prefix",
        (
            Column[Prefix]("windows", lambda p: f"{p.stop:,}"),
            Column[Prefix]("scored tokens", lambda p: f"{p.scored_tokens:,}"),
            Column[Prefix](
                "perplexity", lambda p: with_interval(p.perplexity, p.low, p.high), better="lower"
            ),
        ),
        result.prefixes,
        "95 % intervals: moving-block bootstrap over windows.",
    )


def segment_table(result: PerplexityResult) -> Table[Prefix]:
    """The windows between the marks: the text's own variation."""
    return Table(
        "By segment",
        (
            Column[Prefix]("windows", lambda p: f"{p.start:,}–{p.stop:,}"),
            Column[Prefix]("scored tokens", lambda p: f"{p.scored_tokens:,}"),
            Column[Prefix](
                "perplexity", lambda p: with_interval(p.perplexity, p.low, p.high), better="lower"
            ),
        ),
        result.segments,
        "What differs between segments is the text, not the model.",
    )


def compare_table(result: CompareResult) -> Table[Pair]:
    """A candidate against its baseline, a quantity a row."""
    delta = with_interval(result.delta_ln_ppl, result.low, result.high)
    rows: list[Pair] = [
        ("baseline perplexity", f"{result.baseline_perplexity:.4f}"),
        ("candidate perplexity", f"{result.candidate_perplexity:.4f}"),
        ("Δ ln PPL, 95 % interval", ", ".join(filter(None, (delta, p_text(result.p_value))))),
    ]
    kl = result.divergence
    rows += [
        ("KL divergence [nats]: mean", f"{kl.mean:.5f}" if kl else NOT_MEASURED),
        ("KL divergence [nats]: median", f"{kl.median:.5f}" if kl else NOT_MEASURED),
        ("KL divergence [nats]: 99th percentile", f"{kl.p99:.4f}" if kl else NOT_MEASURED),
        (
            "same most likely token [%]",
            with_interval(
                100 * kl.top1_agreement,
                None if kl.top1_agreement_low is None else 100 * kl.top1_agreement_low,
                None if kl.top1_agreement_high is None else 100 * kl.top1_agreement_high,
            )
            if kl
            else NOT_MEASURED,
        ),
    ]
    caption = f"{result.windows:,} windows, {result.scored_tokens:,} scored tokens, paired by window."
    if result.divergence_absent:
        caption += f" No divergence: {result.divergence_absent}."
    return Table(
        f"{result.candidate_run} against {result.baseline_run}",
        (Column[Pair]("quantity", lambda r: r[0]), Column[Pair]("value", lambda r: r[1])),
        rows,
        caption,
    )


def runs_table(records: Sequence[Record]) -> Table[Record]:
    """Perplexity runs side by side, whatever they ran on."""

    def result(record: Record) -> PerplexityResult:
        assert isinstance(record.results, PerplexityResult)
        return record.results

    def model(record: Record) -> str:
        assert record.model is not None
        return f"{record.model.name} ({record.model.stored}, {record.model.dtype})"

    def text(record: Record) -> str:
        assert record.text is not None
        assert record.protocol is not None
        # the built-in text differs between versions of Python
        source = f" of {record.text.source.rpartition(' of ')[2]}" if record.text.corpus == "builtin" else ""
        return f"{record.text.corpus}{source}, {record.protocol.name}"

    return Table(
        "Perplexity",
        (
            Column[Record]("model", model, label=True),
            Column[Record]("engine", lambda r: str(r.engaged.get("engine", "torch")), label=True),
            Column[Record]("text, protocol", text, label=True),
            Column[Record]("windows", lambda r: f"{result(r).windows:,}"),
            Column[Record](
                "perplexity",
                lambda r: plus_minus(result(r).perplexity, result(r).low, result(r).high),
                better="lower",
            ),
            Column[Record]("bits per byte", lambda r: f"{result(r).bits_per_byte:.4f}", better="lower"),
            Column[Record](
                "scored tokens/s", lambda r: f"{result(r).scored_tokens_per_s:,.0f}", better="higher"
            ),
            Column[Record]("on", lambda r: r.model.device_name if r.model else NOT_MEASURED),
        ),
        records,
        "± is half the 95 % interval over the windows of the text.",
    )
