"""Intervals for sums over consecutive windows of one text.

Neighbouring windows share context and topic, so they are resampled in blocks: the moving-block bootstrap of
Künsch, The Jackknife and the Bootstrap for General Stationary Observations, Annals of Statistics 17 (1989),
with the block length n^(1/3) of Hall, Horowitz and Jing, Biometrika 82 (1995). Perplexity is a ratio of two
sums, so nats and counts are resampled together.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 4000
SEED = 20260329
MIN_WINDOWS = 10  # below this a percentile interval says nothing

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A central interval of confidence `level`, in the unit of the estimate."""

    low: float
    high: float
    level: float = 0.95

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def block_length(n: int) -> int:
    """Windows in a resampled block, n^(1/3) rounded."""
    return max(1, round(n ** (1 / 3)))


def bootstrap_ratio(numerator: Floats, denominator: Floats) -> Floats | None:
    """Resampled values of Σ numerator / Σ denominator.

    Args:
        numerator, denominator: one value a window, in text order, shape [n].

    Returns:
        Shape [RESAMPLES], seeded, so equal samples give equal intervals; None below MIN_WINDOWS windows.
    """
    n = len(numerator)
    if n < MIN_WINDOWS:
        return None
    length = block_length(n)
    blocks = -(-n // length)
    rng = np.random.default_rng(SEED)
    starts = rng.integers(0, n - length + 1, size=(RESAMPLES, blocks))
    # prefix sums give each block's sum at once; the last block is cut so that n windows are drawn
    last = n - (blocks - 1) * length
    ends = starts + length
    ends[:, -1] = starts[:, -1] + last

    def resample(values: Floats) -> Floats:
        prefix = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
        return (prefix[ends] - prefix[starts]).sum(axis=1)

    return resample(numerator) / resample(denominator)


def percentile_interval(samples: Floats, level: float = 0.95) -> Interval:
    """The central interval of the bootstrap distribution."""
    tail = (1 - level) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    return Interval(float(low), float(high), level)


def two_sided_p(samples: Floats) -> float:
    """Bootstrap p-value of the hypothesis that the resampled quantity is zero, at least 2/(RESAMPLES + 1).

    Davison and Hinkley, Bootstrap Methods and their Application (1997), section 4.4.
    """
    below = (np.count_nonzero(samples <= 0) + 1) / (len(samples) + 1)
    above = (np.count_nonzero(samples >= 0) + 1) / (len(samples) + 1)
    return float(min(1.0, 2 * min(below, above)))
