"""Intervals: for sums over consecutive windows of one text, and for means of repeats.

Neighbouring windows share context and topic, so they are resampled in blocks: the moving-block bootstrap of
Künsch, The Jackknife and the Bootstrap for General Stationary Observations, Annals of Statistics 17 (1989),
with the block length n^(1/3) of Hall, Horowitz and Jing, Biometrika 82 (1995). Perplexity is a ratio of two
sums, so nats and counts are resampled together.
"""

import math
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


def t_interval(values: Floats) -> Interval | None:
    """The 95 % interval of a mean of independent repeats: mean ± t·s/√n; None below two of them."""
    n = len(values)
    if n < 2:
        return None
    half = t_quantile(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    mean = float(np.mean(values))
    return Interval(mean - half, mean + half)


def t_quantile(freedom: int, two_sided: float = 0.95) -> float:
    """The t within which Student's distribution lies with probability `two_sided`.

    The distribution in closed form, Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 26.7.3
    and 26.7.4, is solved by bisection on the angle arctan(t/√freedom).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if _t_probability(middle, freedom) < two_sided:
            low = middle
        else:
            high = middle
    return math.tan(low) * math.sqrt(freedom)


def _t_probability(angle: float, freedom: int) -> float:
    """P(|T| < √freedom · tan angle)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = total = cosine if odd else 1.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    if not odd:
        return sine * total
    return 2 / math.pi * (angle + (sine * total if freedom > 1 else 0.0))
