"""Quantities as text."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalsuite.core.units import decimals_for, duration, si_bytes


@pytest.mark.parametrize(
    ("uncertainty", "digits"),
    [(0.093, 3), (0.1, 2), (0.95, 2), (1.0, 1), (9.9, 1), (12, 0), (500, 0), (0.00012, 5), (1e-9, 6)],
)
def test_two_digits_of_the_uncertainty_are_kept(uncertainty: float, digits: int):
    assert decimals_for(uncertainty) == digits


@given(st.floats(1e-4, 9.4))
def test_what_is_written_has_two_or_three_significant_digits(uncertainty: float):
    text = f"{uncertainty:.{decimals_for(uncertainty)}f}"
    assert len(text.replace(".", "").lstrip("0")) in (2, 3)  # 3 where rounding carries: 0.0996 is 0.100
    assert float(text) == pytest.approx(uncertainty, rel=0.05)


@pytest.mark.parametrize("uncertainty", [0.0, -1.0, math.nan, math.inf])
def test_without_an_uncertainty_there_are_four_decimals(uncertainty: float):
    assert decimals_for(uncertainty) == 4


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (25_921_656, "25.9 MB"),
        (19.4e9, "19.4 GB"),
        (2.5e12, "2.5 TB"),
    ],
)
def test_bytes_are_decimal(count: float, text: str):
    assert si_bytes(count) == text


@given(st.integers(0, 10**15 - 1))
def test_bytes_are_never_written_with_an_exponent(count: int):
    text = si_bytes(count)
    assert re.fullmatch(r"\d{1,4}(\.\d+)? ([kMGT]?B)", text), text
    number, unit = text.split()
    size = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert float(number) * size == pytest.approx(count, rel=0.006, abs=0.5)


@pytest.mark.parametrize("count", [999.7e3, 999.7e6, 999.7e9])
def test_just_below_the_next_unit(count: float):
    assert "e+" not in si_bytes(count)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (3.14, "3.1 s"),
        (41, "41 s"),
        (200, "3 min 20 s"),
        (3600, "1 h 00 min"),
        (7512, "2 h 05 min"),
    ],
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text


@pytest.mark.parametrize("seconds", [59.6, 59.99])
def test_a_minute_is_written_as_one(seconds: float):
    assert duration(seconds) != "60 s"
