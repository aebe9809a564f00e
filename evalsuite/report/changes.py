"""What a number was and what it is: metrics of two records of one spec, and their change with its interval.

    relative change = new / old − 1        absolute change = new − old

A relative change is of a positive value. A metric that may be of either sign, such as Δ ln PPL, has an
absolute change only: a share of a value near 0 says nothing, and of a negative one it has the wrong sign.

A perplexity's interval is paired by window, from the samples of both runs, so that the text's own variation
cancels. Those of other metrics combine the two intervals as of independent estimates, half widths added in
squares. A metric without repeats has none.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from evalsuite.core.errors import StorageError
from evalsuite.core.record import CompareResult, PerplexityResult, QuantizeResult, Record
from evalsuite.core.speed import Estimate, FootprintResult, SpeedResult
from evalsuite.core.stats import bootstrap_ratio, percentile_interval
from evalsuite.report.vram import device_peak, engine_numbers
from evalsuite.store.runs import StoredRun, load_windows


@dataclass(frozen=True)
class Number:
    """A value and the ends of its 95 % interval, in the metric's unit."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Metric:
    """A number of a record.

    Attributes:
        read: gives None where a record does not have it.
        signed: it may be negative, so it has no relative change.
    """

    name: str
    unit: str
    better: Literal["lower", "higher"] | None
    meaning: str
    read: Callable[[Record], Number | None]
    signed: bool = False


@dataclass(frozen=True)
class Shift:
    """A change and the ends of its interval."""

    value: float
    low: float | None
    high: float | None

    @property
    def certain(self) -> bool | None:
        """Whether its interval leaves out 0; None where it has none."""
        return None if self.low is None or self.high is None else not self.low <= 0 <= self.high


def _perplexity(record: Record) -> Number | None:
    found = record.results
    if not isinstance(found, PerplexityResult):
        return None
    return Number(found.perplexity, found.low, found.high)


def _estimate(
    read: Callable[[SpeedResult], Estimate], scale: float = 1.0
) -> Callable[[Record], Number | None]:
    def get(record: Record) -> Number | None:
        if not isinstance(record.results, SpeedResult):
            return None
        found = read(record.results)
        ends = (None if end is None else scale * end for end in (found.low, found.high))
        return Number(scale * found.mean, *ends)

    return get


def _load(record: Record) -> Number | None:
    found = record.results
    if not isinstance(found, SpeedResult | FootprintResult) or found.load.total_s is None:
        return None
    return Number(found.load.total_s)


def _hits(record: Record) -> Number | None:
    rate = record.expert_cache.hit_rate if record.expert_cache else None
    return None if rate is None else Number(100 * rate)


def _served(read: Callable[[Record], float | None]) -> Callable[[Record], Number | None]:
    def get(record: Record) -> Number | None:
        found = read(record) if record.kind in ("speed", "footprint") else None
        return None if found is None else Number(found / 1e9)

    return get


def _compared(read: Callable[[CompareResult], Number | None]) -> Callable[[Record], Number | None]:
    return lambda record: read(record.results) if isinstance(record.results, CompareResult) else None


def _quantized(read: Callable[[QuantizeResult], float | None]) -> Callable[[Record], Number | None]:
    def get(record: Record) -> Number | None:
        found = read(record.results) if isinstance(record.results, QuantizeResult) else None
        return None if found is None else Number(found)

    return get


def _top1(found: CompareResult) -> Number | None:
    kl = found.divergence
    if kl is None:
        return None
    ends = (None if e is None else 100 * e for e in (kl.top1_agreement_low, kl.top1_agreement_high))
    return Number(100 * kl.top1_agreement, *ends)


_ALL = (
    Metric("ppl", "", "lower", "perplexity", _perplexity),
    Metric(
        "decode_tok_s", "tok/s", "higher", "decode speed of one sequence",
        _estimate(lambda r: r.decode_tokens_per_s),
    ),
    Metric(
        "output_tok_s", "tok/s", "higher", "output of all requests",
        _estimate(lambda r: r.output_tokens_per_s),
    ),
    Metric("prefill_tok_s", "tok/s", "higher", "prefill speed", _estimate(lambda r: r.prefill_tokens_per_s)),
    Metric("ttft_ms", "ms", "lower", "time to the first token", _estimate(lambda r: r.ttft_s, 1000)),
    Metric("tpot_ms", "ms", "lower", "time per output token", _estimate(lambda r: r.tpot_s, 1000)),
    Metric("load_s", "s", "lower", "time until ready", _load),
    Metric("hits_percent", "%", "higher", "hit rate of the expert cache", _hits),
    Metric(
        "weights_gb", "GB", "lower", "weights on the device",
        _served(lambda r: engine_numbers(r).weights_bytes),
    ),
    Metric("vram_gb", "GB", "lower", "NVML's peak", _served(device_peak)),
    Metric(
        "rss_gb", "GB", "lower", "resident set of the process tree",
        _served(lambda r: r.telemetry.rss_peak_bytes if r.telemetry else None),
    ),
    Metric(
        "delta_ln_ppl", "", "lower", "Δ ln PPL against the baseline",
        _compared(lambda c: Number(c.delta_ln_ppl, c.low, c.high)), signed=True,
    ),
    Metric(
        "kl_nats", "nats", "lower", "mean KL divergence from the baseline",
        _compared(lambda c: Number(c.divergence.mean) if c.divergence else None),
    ),
    Metric("top1_percent", "%", "higher", "share of tokens with the same top token", _compared(_top1)),
    Metric(
        "error", "", "lower", "‖W − Ŵ‖ / ‖W‖ of the quantized weights",
        _quantized(lambda q: q.total.relative_error),
    ),
    Metric(
        "bits_per_weight", "bits", "lower", "of the quantized weights",
        _quantized(lambda q: q.bits_per_weight),
    ),
)  # fmt: skip
METRICS = {metric.name: metric for metric in _ALL}


def relative(old: Number, new: Number) -> Shift | None:
    """new / old − 1; None where the old value is not positive."""
    if old.value <= 0:
        return None
    ratio = new.value / old.value
    halves = _halves((old, new))
    if halves is None or new.value == 0:
        return Shift(ratio - 1, None, None)
    half = abs(ratio) * math.hypot(halves[0] / old.value, halves[1] / new.value)
    return Shift(ratio - 1, ratio - 1 - half, ratio - 1 + half)


def absolute(old: Number, new: Number) -> Shift:
    """new − old."""
    gap, halves = new.value - old.value, _halves((old, new))
    if halves is None:
        return Shift(gap, None, None)
    half = math.hypot(*halves)
    return Shift(gap, gap - half, gap + half)


def paired_perplexity(old: StoredRun, new: StoredRun) -> Shift | None:
    """The relative change of a perplexity, paired by window; None where the samples are not both there.

    Equal nats in every window, as of the same weights in the same arithmetic, give 0 and an interval of 0.
    """
    try:
        before, after = load_windows(old.path), load_windows(new.path)
    except StorageError:
        return None
    if before[["start", "first_scored", "stop"]].to_numpy().tolist() != (
        after[["start", "first_scored", "stop"]].to_numpy().tolist()
    ):
        return None
    counts = before["scored"].to_numpy(float)
    gaps = after["nats"].to_numpy(float) - before["nats"].to_numpy(float)
    samples = bootstrap_ratio(gaps, counts)
    interval = None if samples is None else percentile_interval(np.expm1(samples))
    return Shift(
        math.expm1(float(gaps.sum() / counts.sum())),
        interval.low if interval else None,
        interval.high if interval else None,
    )


def _halves(numbers: Sequence[Number]) -> list[float] | None:
    found = [(n.high - n.low) / 2 for n in numbers if n.low is not None and n.high is not None]
    return found if len(found) == len(numbers) else None
