"""Bootstrap intervals against known truth, and rounding by uncertainty."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from evalsuite.core import stats
from evalsuite.core.stats import (
    MIN_WINDOWS,
    RESAMPLES,
    Interval,
    block_length,
    bootstrap_ratio,
    percentile_interval,
    t_interval,
    t_quantile,
    two_sided_p,
)


def test_the_block_length_is_the_cube_root():
    assert [block_length(n) for n in (1, 8, 27, 64, 1000, 1155)] == [1, 2, 3, 4, 10, 10]


@pytest.mark.parametrize("n", [11, 13, 29, 101])
def test_each_resample_draws_exactly_n_windows(n: int):
    """Of a window with nats 1 among windows of nats 0, n drawn ones hold k/n, k whole; n is prime."""
    weight = np.zeros(n)
    weight[n // 2] = 1
    samples = bootstrap_ratio(weight, np.ones(n))
    assert samples is not None
    assert samples.shape == (RESAMPLES,)
    drawn = samples * n
    np.testing.assert_allclose(drawn, np.round(drawn), atol=1e-9)
    assert len(np.unique(np.round(drawn))) > 1
    # in the middle of the text every block start is as likely as any other: 1 on average
    assert drawn.mean() == pytest.approx(1, abs=0.12)


def test_windows_are_drawn_in_runs():
    """Neighbours stay together: with blocks of 5, a strictly alternating series hardly varies."""
    alternating = np.tile([0.0, 1.0], 63)  # 126 windows, block length 5
    shuffled = np.random.default_rng(1).permutation(alternating)
    ones = np.ones(126)
    assert bootstrap_ratio(alternating, ones).std() < 0.5 * bootstrap_ratio(shuffled, ones).std()


def test_positive_correlation_widens_the_interval():
    rng = np.random.default_rng(3)
    noise = rng.normal(size=1000)
    walk = np.convolve(rng.normal(size=1009), np.ones(10) / math.sqrt(10), mode="valid")
    widths = [
        percentile_interval(bootstrap_ratio(x / x.std(), np.ones(1000))).half_width for x in (noise, walk)
    ]
    assert widths[1] > 1.8 * widths[0]


def test_nats_and_counts_are_resampled_together():
    """A constant ratio has no spread, however the windows differ in length."""
    counts = np.random.default_rng(0).integers(1, 2048, size=200).astype(float)
    samples = bootstrap_ratio(1.75 * counts, counts)
    np.testing.assert_allclose(samples, 1.75, rtol=1e-12)


def test_equal_samples_give_equal_intervals():
    rng = np.random.default_rng(7)
    nats, counts = rng.normal(500, 50, 300), np.full(300, 256.0)
    first, second = bootstrap_ratio(nats, counts), bootstrap_ratio(nats.copy(), counts.copy())
    assert np.array_equal(first, second)
    assert percentile_interval(first) == percentile_interval(second)


def test_below_ten_windows_there_is_no_interval():
    values = np.arange(MIN_WINDOWS, dtype=float)
    assert bootstrap_ratio(values[:-1], np.ones(MIN_WINDOWS - 1)) is None
    assert bootstrap_ratio(values[:0], values[:0]) is None
    assert bootstrap_ratio(values, np.ones(MIN_WINDOWS)) is not None


def test_the_interval_covers_the_truth_95_times_in_100():
    """400 texts of 240 independent windows with known mean, as the percentile bootstrap sees them.

    The binomial error of the rate is 1.1 points; blocks of 6 in 240 windows cost about 2 points.
    """
    truth, n, texts = 2.0, 240, 400
    rng = np.random.default_rng(2024)
    hits = 0
    for _ in range(texts):
        nats = truth + rng.gamma(2.0, 0.1, n) - 0.2
        interval = percentile_interval(bootstrap_ratio(nats, np.ones(n)))
        hits += interval.low <= truth <= interval.high
    assert 0.90 <= hits / texts <= 0.98


def test_the_interval_has_the_width_of_the_normal_one():
    rng = np.random.default_rng(11)
    x = rng.normal(0, 1, 4096)
    half = percentile_interval(bootstrap_ratio(x, np.ones(4096))).half_width
    assert half == pytest.approx(1.96 * x.std() / 64, rel=0.12)


def test_percentiles_of_a_known_distribution():
    interval = percentile_interval(np.arange(1001, dtype=float))
    assert (interval.low, interval.high) == (pytest.approx(25), pytest.approx(975))
    assert (interval.level, interval.half_width) == (0.95, pytest.approx(475))
    assert percentile_interval(np.arange(1001, dtype=float), 0.5) == Interval(250, 750, 0.5)


class TestPValue:
    def draws(self, shift: float, texts: int) -> np.ndarray:
        rng = np.random.default_rng(99)
        ones = np.ones(150)
        return np.array([two_sided_p(bootstrap_ratio(rng.normal(shift, 1, 150), ones)) for _ in range(texts)])

    def test_under_the_null_it_is_about_uniform(self):
        p = self.draws(0.0, 400)
        assert p.mean() == pytest.approx(0.5, abs=0.06)
        assert 0.02 <= (p < 0.05).mean() <= 0.12
        assert 0.40 <= (p < 0.5).mean() <= 0.60

    def test_a_large_shift_gives_the_smallest_value_there_is(self):
        np.testing.assert_allclose(self.draws(2.0, 5), 2 / (RESAMPLES + 1))

    def test_it_has_two_sides(self):
        samples = np.random.default_rng(5).normal(0.7, 1, RESAMPLES)
        assert two_sided_p(samples) == two_sided_p(-samples)
        assert two_sided_p(samples) == pytest.approx(0.484, abs=0.05)  # 2 Φ(−0.7)

    def test_no_difference_at_all_is_no_evidence(self):
        assert two_sided_p(np.zeros(100)) == 1.0

    @given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
    def test_it_is_a_probability(self, values: list[float]):
        assert 0 < two_sided_p(np.array(values)) <= 1


def test_the_module_keeps_its_seed():
    """Published intervals can be recomputed only while these stay."""
    assert (stats.SEED, stats.RESAMPLES) == (20260329, 4000)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 10, 29, 200])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_the_t_quantile_is_scipys(freedom, level):
    expected = scipy.stats.t.ppf((1 + level) / 2, freedom)
    assert t_quantile(freedom, level) == pytest.approx(expected, rel=1e-9)


def test_the_t_interval_is_scipys():
    values = np.random.default_rng(1).normal(5, 2, 7)
    found = t_interval(values)
    low, high = scipy.stats.t.interval(0.95, 6, values.mean(), scipy.stats.sem(values))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert t_interval(values[:1]) is None
