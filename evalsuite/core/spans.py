"""Perplexity of stretches of a run, from its samples.

    PPL(a, b) = exp( Σ nats / Σ scored tokens )      over windows a to b, b exclusive

with the 95 % interval of a moving-block bootstrap over the windows (`evalsuite.core.stats`). A prefix starts
at window 0; segments lie between the same marks, and show how much the text itself varies.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from evalsuite.core.errors import MeasurementError
from evalsuite.core.record import Prefix
from evalsuite.core.stats import bootstrap_ratio, percentile_interval

PREFIX_MARKS = (200, 500, 1000)
LARGEST_EXPONENT = 700  # e^709 is the largest float


def mean_exp(nats: float, count: int) -> float:
    """NaN where nothing was counted, infinity where no float is large enough."""
    if not count:
        return math.nan
    return math.exp(nats / count) if nats / count < LARGEST_EXPONENT else math.inf


def prefixes(frame: pd.DataFrame, marks: Sequence[int] = PREFIX_MARKS) -> tuple[Prefix, ...]:
    """Perplexity of the first windows up to each mark, and of all."""
    stops = [mark for mark in marks if mark < len(frame)] + [len(frame)]
    return tuple(span(frame, 0, stop) for stop in stops)


def segments(frame: pd.DataFrame, marks: Sequence[int] = PREFIX_MARKS) -> tuple[Prefix, ...]:
    """Perplexity of the windows between the marks: how much the text itself varies."""
    stops = [mark for mark in marks if mark < len(frame)] + [len(frame)]
    return tuple(span(frame, start, stop) for start, stop in zip([0, *stops], stops, strict=False))


def span(frame: pd.DataFrame, start: int, stop: int) -> Prefix:
    """Perplexity of windows `start` to `stop`, exclusive, with its interval."""
    part = frame.iloc[start:stop]
    nats, counts = part["nats"].to_numpy(float), part["scored"].to_numpy(float)
    scored = int(counts.sum())
    perplexity = mean_exp(math.fsum(nats), scored)
    if perplexity == math.inf:
        raise MeasurementError(
            f"Windows {start} to {stop} have {math.fsum(nats) / scored:,.0f} nats a token: no perplexity can "
            "be written down.",
            cause="the weights are damaged, or config.json belongs to another model.",
            todo="download the checkpoint again.",
        )
    samples = bootstrap_ratio(nats, counts)
    interval = None if samples is None else percentile_interval(np.exp(samples))
    return Prefix(
        start=start,
        stop=stop,
        scored_tokens=scored,
        perplexity=perplexity,
        low=interval.low if interval else None,
        high=interval.high if interval else None,
    )


def running_perplexity(frame: pd.DataFrame) -> pd.DataFrame:
    """Perplexity of the first n windows for growing n, with its interval, for a convergence picture.

    Returns:
        Columns windows, perplexity, low, high; at most about 120 rows; low and high NaN where absent.
    """
    n = len(frame)
    stops = sorted({*np.unique(np.linspace(1, n, min(n, 120)).astype(int)).tolist(), n})
    rows: list[dict[str, Any]] = []
    for stop in stops:
        part = span(frame, 0, stop)
        rows.append({"windows": stop, "perplexity": part.perplexity, "low": part.low, "high": part.high})
    return pd.DataFrame(rows).astype(float)
