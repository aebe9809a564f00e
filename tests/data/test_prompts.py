"""Prompts: exact length, real text, different, and the same for the same seed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalsuite.core.errors import UsageError
from evalsuite.data.prompts import cut_prompts
from evalsuite.data.tokens import TokenStream


def stream(n):
    return TokenStream(np.arange(n), np.ones(n, np.int64), np.ones(n, np.int64))


@given(st.integers(1, 12), st.integers(0, 60), st.data())
def test_every_prompt_is_a_stretch_of_the_text_and_no_two_are_equal(length, more, data):
    tokens = length + more
    count = data.draw(st.integers(0, tokens - length + 1))
    prompts = cut_prompts(stream(tokens), length, count, seed=3)
    starts = [int(p[0]) for p in prompts]
    assert len(prompts) == count == len(set(starts))
    assert all(p.tolist() == list(range(s, s + length)) for p, s in zip(prompts, starts, strict=True))
    whole = tokens // length
    assert all(start % length == 0 for start in starts[:whole])  # no overlap while the text lasts


def test_the_seed_decides_and_a_longer_list_begins_with_the_shorter():
    few, many = (cut_prompts(stream(1000), 10, n, seed=7) for n in (5, 50))
    assert np.array_equal(few, many[:5])
    assert not np.array_equal(few, cut_prompts(stream(1000), 10, 5, seed=8))


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(UsageError, match="too few for 12 different prompts of 10"):
        cut_prompts(stream(20), 10, 12, seed=0)
