"""Whether two arms generated the same greedy tokens from the same prompts.

    agreement = mean over sequences of (tokens before the first difference / tokens)

A share of 1 means that all sequences are identical. Greedy decoding of one model differs between arms only
by arithmetic (another order of summation, which flips near-ties) or by a fault, such as a wrong expert:
a fault shows within few tokens. Comparing tokens position by position would punish a single early flip as
if every later token were wrong, and so would reward nothing.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from evalsuite.core.errors import NotComparable

KEYS = ["repeat", "request", "position"]


@dataclass(frozen=True)
class Agreement:
    """Over all sequences, warm-ups included.

    Attributes:
        share: of tokens before the first difference, mean over the sequences.
        identical: sequences that do not differ at all.
    """

    share: float
    identical: int
    sequences: int


def token_agreement(reference: pd.DataFrame, other: pd.DataFrame) -> Agreement:
    """Compare two runs' rows of `evalsuite.measure.speed.token_rows`.

    Raises:
        NotComparable: they do not hold the same requests of the same length.
    """
    merged = reference.merge(other, on=KEYS, how="outer", indicator=True, suffixes=("", "_other"))
    if not (merged["_merge"] == "both").all():
        raise NotComparable(
            "The two runs hold different requests, so their tokens cannot be compared.",
            todo="compare runs with the same repeats, concurrency and output length.",
        )
    merged = merged.sort_values(KEYS)
    equal = (merged["token"] == merged["token_other"]).groupby([merged["repeat"], merged["request"]])
    shares = equal.apply(lambda same: float(np.cumprod(same.to_numpy()).mean())).to_numpy(dtype=np.float64)
    return Agreement(float(shares.mean()), int((shares == 1).sum()), len(shares))
