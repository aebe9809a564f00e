"""Token agreement on sequences whose first difference is known."""

import numpy as np
import pytest

from evalsuite.core.agreement import token_agreement
from evalsuite.core.errors import NotComparable
from evalsuite.engines.base import Generated
from evalsuite.measure.speed import token_rows


def rows(*sequences):
    stamps = np.arange(1.0, 1 + len(sequences[0]))
    return token_rows(0, False, [Generated(np.array(s), 0.0, stamps) for s in sequences])


def test_equal_tokens_agree():
    found = token_agreement(rows([1, 2, 3], [4, 5, 6]), rows([1, 2, 3], [4, 5, 6]))
    assert (found.share, found.identical, found.sequences) == (1.0, 2, 2)


def test_what_follows_the_first_difference_does_not_count():
    # the second sequence parts after one of four tokens, and meets again by chance
    found = token_agreement(rows([1, 2, 3, 4], [5, 6, 7, 8]), rows([1, 2, 3, 4], [5, 0, 7, 8]))
    assert (found.share, found.identical) == (0.625, 1)


def test_another_first_token_is_no_agreement():
    assert token_agreement(rows([1, 2]), rows([0, 2])).share == 0.0


def test_other_requests_are_refused():
    with pytest.raises(NotComparable):
        token_agreement(rows([1, 2]), rows([1, 2], [3, 4]))
