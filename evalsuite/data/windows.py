"""From a protocol and a number of tokens to the windows, and back from a card's counts to protocols."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evalsuite.core.errors import UsageError
from evalsuite.core.protocol import PROTOCOLS, WindowProtocol
from evalsuite.data.tokens import TokenStream

COMMON_CONTEXTS = (256, 512, 1024, 1536, 2048, 4096, 8192)
COMMON_STRIDES = (64, 128, 256, 512, 1024, 1536, 2048, 4096, 8192)


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens `start` to `stop` of the text, of which `first_scored` and later are scored.

    Positions count from the start of the text; at least one token of context precedes every scored token.
    """

    index: int
    start: int
    stop: int
    first_scored: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def scored(self) -> int:
        return self.stop - self.first_scored


@dataclass(frozen=True)
class TokenWindow:
    """A window with its tokens: `ids` int64 [length], of which those from `offset` on are scored."""

    index: int
    ids: NDArray[np.int64]
    offset: int

    @property
    def scored(self) -> int:
        return len(self.ids) - self.offset


def count_windows(tokens: int, protocol: WindowProtocol) -> int:
    """How many windows a text of `tokens` tokens has."""
    if tokens < 2:
        return 0
    if protocol.tail == "drop":
        return max(0, (tokens - protocol.context) // protocol.stride + 1)
    count = max(0, -(-(tokens - protocol.context) // protocol.stride)) + 1
    # a tail of one token has nothing before it: the Hugging Face loop visits it, and no loss comes of it
    return count if window(count - 1, tokens, protocol).scored else count - 1


def window(index: int, tokens: int, protocol: WindowProtocol) -> Window:
    """The window of that index, without listing those before it."""
    start = index * protocol.stride
    stop = min(start + protocol.context, tokens)
    if index == 0 and protocol.first_window == "whole":
        first = 1
    elif protocol.scored == "second-half":
        first = start + protocol.context // 2 + 1
    else:
        # what the window before has not reached; for full windows, the last `stride` tokens
        first = max(start + protocol.context - protocol.stride, start + 1)
    return Window(index, start, stop, first)


def plan_windows(tokens: int, protocol: WindowProtocol, limit: int | None = None) -> list[Window]:
    """The windows in text order, at most `limit` of them.

    Raises:
        UsageError: the text is shorter than one window.
    """
    available = count_windows(tokens, protocol)
    if available == 0:
        raise UsageError(
            f"The text has {tokens:,} tokens, less than one window of {protocol.context:,}.",
            todo="give a longer text or a smaller --context.",
        )
    count = available if limit is None else min(limit, available)
    return [window(index, tokens, protocol) for index in range(count)]


def cut(stream: TokenStream, windows: list[Window]) -> Iterator[TokenWindow]:
    """The tokens of each window, its first replaced where the protocol asks for a BOS in each."""
    for w in windows:
        ids = stream.ids[w.start : w.stop]
        if stream.window_bos is not None:
            ids = ids.copy()
            ids[0] = stream.window_bos
        yield TokenWindow(w.index, ids, w.first_scored - w.start)


@dataclass(frozen=True)
class Fit:
    """A protocol under which a text of `tokens` tokens has the counts asked for.

    `contexts` is the whole range of contexts with the same counts; `protocol` holds a common one.
    """

    protocol: WindowProtocol
    tokens: int
    contexts: tuple[int, int]


def fit_protocols(windows: int, scored_tokens: int, tokens: int) -> list[Fit]:
    """Protocols that give exactly these counts on a text of that many tokens.

    The families tried are those of the presets, over every common stride and, for overlapping windows,
    every context that is a multiple of 128.
    """
    fits: list[Fit] = []
    for family in PROTOCOLS.values():
        if family.name == "paper":  # the same family as card-1155
            continue
        for context, stride in _candidates(family):
            candidate = family.model_copy(
                update={"name": _family_name(family), "context": context, "stride": stride}
            )
            if _counts(tokens, candidate) == (windows, scored_tokens):
                same = [f for f in fits if f.protocol.name == candidate.name and f.protocol.stride == stride]
                if not same:
                    fits.append(
                        Fit(candidate, tokens, _context_range(tokens, candidate, windows, scored_tokens))
                    )
    return fits


def _candidates(family: WindowProtocol) -> Iterator[tuple[int, int]]:
    if family.disjoint:
        yield from ((context, context) for context in COMMON_CONTEXTS)
        return
    multiples = [c for c in range(128, 8193, 128) if c not in COMMON_CONTEXTS]
    for stride in COMMON_STRIDES:
        yield from ((context, stride) for context in (*COMMON_CONTEXTS, *multiples) if context > stride)


def _family_name(family: WindowProtocol) -> str:
    return "full windows" if family.name == "card-1155" else family.name


def _counts(tokens: int, protocol: WindowProtocol) -> tuple[int, int]:
    count = count_windows(tokens, protocol)
    if count == 0:
        return 0, 0
    first, last = window(0, tokens, protocol), window(count - 1, tokens, protocol)
    middle = window(1, tokens, protocol).scored if count > 2 else 0
    return count, first.scored + (last.scored if count > 1 else 0) + middle * max(0, count - 2)


def _context_range(tokens: int, fit: WindowProtocol, windows: int, scored: int) -> tuple[int, int]:
    """Grow the context both ways while the counts stay the same."""

    def holds(context: int) -> bool:
        if not max(2, fit.stride) <= context <= tokens:
            return False
        return _counts(tokens, fit.model_copy(update={"context": context})) == (windows, scored)

    low = high = fit.context
    if not fit.disjoint:
        while holds(low - 1):
            low -= 1
        while holds(high + 1):
            high += 1
    return low, high
