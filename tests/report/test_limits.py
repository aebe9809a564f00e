"""Limits: what parses, what is refused and why, and when one is crossed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalsuite.core.errors import UsageError
from evalsuite.report.changes import METRICS, Shift
from evalsuite.report.limits import parse_limit


@pytest.mark.parametrize(
    ("text", "metric", "direction", "bound", "is_relative"),
    [
        ("ppl>+1%", "ppl", ">", 0.01, True),
        ("decode_tok_s<-5%", "decode_tok_s", "<", -0.05, True),
        ("decode_tok_s < −5 %", "decode_tok_s", "<", -0.05, True),
        ("vram_gb>+0.5", "vram_gb", ">", 0.5, False),
        ("kl_nats>0", "kl_nats", ">", 0.0, False),
        ("ppl>-1%", "ppl", ">", -0.01, True),
    ],
)
def test_what_parses(text, metric, direction, bound, is_relative):
    limit = parse_limit(text)
    assert (limit.metric.name, limit.direction, limit.is_relative) == (metric, direction, is_relative)
    assert limit.bound == pytest.approx(bound)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("ppl", "is no limit"),
        ("", "is no limit"),
        ("ppl=+1%", "is no limit"),
        ("ppl>>+1%", "is no limit"),
        ("ppl>+1%%", "is no limit"),
        ("ppl>+nan", "is no limit"),
        ("ppl>+1e3", "is no limit"),
        ("ppl>+1%; rm", "is no limit"),
        ("speed>+1%", "there is no metric 'speed'"),
        ("ppl>1%", "a rise or a fall"),
        ("decode_tok_s<5%", "a rise or a fall"),
        ("delta_ln_ppl>+5%", "there is no share of delta_ln_ppl"),
        ("delta_ln_ppl>0%", "there is no share of delta_ln_ppl"),
    ],
)
def test_what_is_refused(text, why):
    with pytest.raises(UsageError, match=why):
        parse_limit(text)


def test_the_refusal_of_a_missing_sign_proposes_the_likely_one():
    with pytest.raises(UsageError) as caught:
        parse_limit("decode_tok_s<5%")
    assert "decode_tok_s<-5%" in str(caught.value)


@given(
    st.sampled_from(sorted(METRICS)), st.sampled_from("<>"), st.sampled_from("+-"),
    st.decimals(0, 999, places=2), st.booleans(),
)  # fmt: skip
def test_every_limit_parses_as_it_reads(name, direction, sign, number, percent):
    percent = percent and not METRICS[name].signed
    limit = parse_limit(f"{name}{direction}{sign}{number}{'%' * percent}")
    assert limit.metric is METRICS[name]
    assert limit.bound == pytest.approx(float(f"{sign}{number}") / (100 if percent else 1))


@pytest.mark.parametrize(
    ("shift", "crossed"),
    [
        (Shift(0.02, 0.011, 0.03), True),  # all of it beyond 1 %
        (Shift(0.02, 0.009, 0.03), False),  # its interval reaches below
        (Shift(0.02, None, None), True),  # no interval: the value decides
        (Shift(0.01, None, None), False),  # not more than the limit
        (Shift(-0.5, -0.6, -0.4), False),  # the other direction
    ],
)
def test_a_rise_is_too_much_where_its_whole_interval_is(shift, crossed):
    assert parse_limit("ppl>+1%").crossed(shift) is crossed


@pytest.mark.parametrize(
    ("shift", "crossed"),
    [
        (Shift(-0.1, -0.14, -0.06), True),
        (Shift(-0.1, -0.16, -0.04), False),
        (Shift(-0.06, None, None), True),
        (Shift(0.5, 0.4, 0.6), False),
    ],
)
def test_a_fall_is_too_much_where_its_whole_interval_is(shift, crossed):
    assert parse_limit("decode_tok_s<-5%").crossed(shift) is crossed
