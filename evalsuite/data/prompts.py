"""Prompts of exact token length, cut from a text: what a model reads in use, not one word many times over."""

from collections.abc import Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from evalsuite.core.errors import UsageError
from evalsuite.data.tokens import TokenStream


def cut_prompts(stream: TokenStream, input_len: int, count: int, seed: int) -> list[NDArray[np.int64]]:
    """`count` different stretches of the text, each of `input_len` tokens, in an order drawn with `seed`.

    They do not overlap while the text is long enough; after that, stretches that start in between follow.
    A longer list begins with the shorter one.

    Returns:
        Arrays of shape [input_len].

    Raises:
        UsageError: the text has fewer stretches of that length.
    """
    available = len(stream) - input_len + 1
    if count > available:
        raise UsageError(
            f"The text has {len(stream):,} tokens, too few for {count} different prompts of {input_len:,}.",
            todo="give a longer text with --corpus, or a smaller --input-len, --repeats or --concurrency.",
        )
    rng = np.random.default_rng(seed)

    def starts() -> Iterator[int]:
        for offset in (0, *(1 + rng.permutation(input_len - 1))):
            whole = np.arange(offset, available, input_len)
            yield from map(int, rng.permutation(whole))

    return [stream.ids[start : start + input_len] for start in islice(starts(), count)]
