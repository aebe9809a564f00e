"""Rows in columns give back the rows that went in."""

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalsuite.store.rows import Rows

ROWS = st.lists(
    st.fixed_dictionaries(
        {"window": st.integers(0, 2**40), "nats": st.floats(allow_nan=False), "scored": st.integers(0, 9)}
    ),
    max_size=12,
)


@given(rows=ROWS, cut=st.integers(0, 12))
def test_what_goes_in_comes_out(rows, cut):
    kept = Rows()
    kept.extend(rows[:cut])
    kept.extend(rows[cut:])
    assert list(kept) == rows
    assert len(kept) == len(rows)
    for mine, theirs in zip(kept, rows, strict=True):
        assert {name: type(value) for name, value in mine.items()} == {n: type(v) for n, v in theirs.items()}
    assert list(kept.column("nats")) == [row["nats"] for row in rows]
    if rows:
        assert kept[-1] == rows[-1]
        pd.testing.assert_frame_equal(kept.frame(), pd.DataFrame(rows))


def test_other_keys_and_other_kinds_are_refused():
    kept = Rows()
    kept.extend([{"window": 0, "nats": 1.0}])
    with pytest.raises(ValueError, match="first one"):
        kept.extend([{"window": 1}])
    with pytest.raises(TypeError):
        kept.extend([{"window": 1.5, "nats": 1.0}])
