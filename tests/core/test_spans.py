"""Perplexities of stretches of a run, by values computed by hand."""

import math

import numpy as np
import pandas as pd
import pytest

from evalsuite.core.errors import MeasurementError
from evalsuite.core.spans import prefixes, running_perplexity, segments, span

LN2 = math.log(2)


def frame_of(nats, scored):
    n = len(nats)
    return pd.DataFrame({"window": range(n), "scored": scored, "nats": nats})


class TestArithmetic:
    """Window 0: 4 tokens of 1 bit; window 1: 1 token of 6 bits. Ten bits over five tokens: perplexity 4."""

    FRAME = frame_of([4 * LN2, 6 * LN2], [4, 1])

    def test_what_no_float_can_hold(self):
        with pytest.raises(MeasurementError, match="800 nats a token"):
            span(frame_of([3200.0], [4]), 0, 1)

    def test_prefixes_and_segments(self):
        nats = np.repeat([1.0, 2.0, 4.0], [200, 300, 100]) * LN2 * 5
        frame = frame_of(nats, [5] * 600)
        first, second, whole = prefixes(frame)
        assert [(p.start, p.stop) for p in (first, second, whole)] == [(0, 200), (0, 500), (0, 600)]
        assert first.perplexity == pytest.approx(2)
        assert second.perplexity == pytest.approx(2 ** (800 / 500))
        assert whole.perplexity == pytest.approx(2 ** (1200 / 600))
        parts = segments(frame)
        assert [(p.start, p.stop, p.scored_tokens) for p in parts] == [
            (0, 200, 1000), (200, 500, 1500), (500, 600, 500)
        ]  # fmt: skip
        assert [p.perplexity for p in parts] == pytest.approx([2, 4, 16])
        assert parts[0].low == pytest.approx(parts[0].perplexity)

    @pytest.mark.parametrize(
        ("n", "stops"), [(3, [3]), (200, [200]), (201, [200, 201]), (1155, [200, 500, 1000, 1155])]
    )
    def test_marks(self, n, stops):
        frame = frame_of([1.0] * n, [1] * n)
        assert [p.stop for p in prefixes(frame)] == stops
        assert [p.stop for p in segments(frame)] == stops
        assert sum(p.scored_tokens for p in segments(frame)) == n

    def test_an_interval_holds_the_value_and_shrinks(self):
        rng = np.random.default_rng(0)
        frame = frame_of(rng.gamma(20, 0.1, 800), [1] * 800)
        small, large = span(frame, 0, 100), span(frame, 0, 800)
        for one in (small, large):
            assert one.low < one.perplexity < one.high
        assert large.high - large.low < 0.6 * (small.high - small.low)

    @pytest.mark.parametrize("n", [1, 2, 50, 500])
    def test_running_perplexity(self, n):
        rng = np.random.default_rng(1)
        nats, scored = rng.random(n) * 9, rng.integers(1, 9, n)
        curve = running_perplexity(frame_of(nats, scored))
        assert curve["windows"].iloc[0] == 1
        assert curve["windows"].iloc[-1] == n
        assert len(curve) <= 121
        for stop, value in zip(curve["windows"].astype(int), curve["perplexity"], strict=True):
            assert value == pytest.approx(math.exp(nats[:stop].sum() / scored[:stop].sum()))
