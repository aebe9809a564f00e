"""Scripted stamps to exact numbers."""

import numpy as np
import pandas as pd
import pytest

from evalsuite.core.errors import MeasurementError
from evalsuite.core.speed import LoadTimes
from evalsuite.engines.base import Generated
from evalsuite.measure.speed import estimate, summarise, token_rows

LOAD = LoadTimes(total_s=1.0)


def request(submitted, *stamps):
    return Generated(np.arange(len(stamps)), submitted, np.array(stamps, dtype=float))


def run(*repeats, warmups=(), input_len=10):
    rounds = [(True, r) for r in warmups] + [(False, r) for r in repeats]
    frames = [token_rows(i, warm, requests) for i, (warm, requests) in enumerate(rounds)]
    return summarise(pd.concat(frames), input_len=input_len, load=LOAD)


def test_one_request():
    # submitted at 100, first token after 0.5 s, then 0.25 s a token
    result = run([request(100.0, 100.5, 100.75, 101.0, 101.25)])
    assert result.ttft_s.mean == 0.5
    assert result.tpot_s.mean == 0.25
    assert result.decode_tokens_per_s.mean == 4.0
    assert result.output_tokens_per_s.mean == 4 / 1.25
    assert result.prefill_tokens_per_s.mean == 10 / 0.5
    assert (result.itl_p50_s, result.itl_p99_s) == (0.25, 0.25)
    assert (result.ttft_s.std, result.ttft_s.low, result.ttft_s.n) == (None, None, 1)
    assert (result.output_len, result.concurrency, result.repeats, result.warmups) == (4, 1, 1, 0)


def test_two_tokens_are_the_fewest():
    result = run([request(0.0, 2.0, 2.5)])
    assert (result.ttft_s.mean, result.tpot_s.mean, result.itl_p50_s) == (2.0, 0.5, 0.5)
    assert result.decode_tokens_per_s.mean == 2.0
    assert result.output_tokens_per_s.mean == 2 / 2.5


def test_tokens_that_arrive_together():
    # chunks of two: gaps 0, 1, 0, 1, 0; TPOT spreads the two seconds over five gaps
    result = run([request(0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0)])
    assert result.tpot_s.mean == pytest.approx(0.4)
    assert result.itl_p50_s == 0.0
    assert result.itl_p99_s == 1.0
    assert result.decode_tokens_per_s.mean == pytest.approx(2.5)


def test_two_requests_at_once():
    result = run([request(0.0, 1.0, 2.0, 3.0), request(0.5, 2.5, 4.5, 6.5)])
    assert result.ttft_s.mean == 1.5  # of 1 and 2
    assert result.tpot_s.mean == 1.5  # of 1 and 2
    assert result.output_tokens_per_s.mean == 6 / 6.5
    assert result.prefill_tokens_per_s.mean == 20 / 2.5
    assert result.concurrency == 2


def test_warmups_are_kept_and_not_counted():
    slow, fast = [request(0.0, 9.0, 18.0)], [request(50.0, 51.0, 52.0)]
    result = run(fast, fast, warmups=[slow])
    assert result.ttft_s.mean == 1.0
    assert (result.repeats, result.warmups) == (2, 1)
    assert result.itl_p99_s == 1.0


def test_repeats_have_an_interval():
    # t(0.975, 2) = 4.302653; values 1, 2, 3: s = 1
    result = run(*([request(0.0, ttft, ttft + 1)] for ttft in (1.0, 2.0, 3.0)))
    assert result.ttft_s.mean == 2.0
    assert result.ttft_s.std == 1.0
    half = 4.302652729911275 / np.sqrt(3)
    assert result.ttft_s.low == pytest.approx(2 - half)
    assert result.ttft_s.high == pytest.approx(2 + half)


def test_the_mean_rate_is_the_mean_of_rates():
    result = run([request(0.0, 1.0, 2.0)], [request(0.0, 1.0, 1.5)])
    assert result.decode_tokens_per_s.mean == 1.5
    assert result.tpot_s.mean == 0.75


@pytest.mark.parametrize("stamps", [(0.5, 2.0), (2.0, 1.5)])
def test_times_that_go_back_are_refused(stamps):
    with pytest.raises(MeasurementError, match="go back"):
        token_rows(0, False, [request(1.0, *stamps)])


def test_an_answer_in_one_piece_is_refused():
    with pytest.raises(MeasurementError, match="at one time"):
        run([request(0.0, 1.0, 1.0, 1.0)])


def test_every_stamp_is_kept():
    frame = token_rows(3, True, [request(0.0, 1.0, 2.0), request(0.0, 1.5, 2.5)])
    assert frame["stamp_s"].tolist() == [1.0, 2.0, 1.5, 2.5]
    assert frame["request"].tolist() == [0, 0, 1, 1]
    assert frame["position"].tolist() == [0, 1, 0, 1]
    assert set(frame["repeat"]) == {3}
    assert frame["warmup"].all()


def test_equal_repeats_have_an_interval_of_no_width():
    value = estimate(np.array([2.0, 2.0]))
    assert (value.std, value.low, value.high) == (0.0, 2.0, 2.0)
