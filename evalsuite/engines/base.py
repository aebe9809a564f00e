"""What an engine is to the rest of the suite."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evalsuite.core.cache import CacheCounters
from evalsuite.core.record import ModelFacts
from evalsuite.core.speed import LoadTimes
from evalsuite.core.telemetry import EngineMemory, Telemetry
from evalsuite.data.windows import TokenWindow


@dataclass(frozen=True)
class WindowScore:
    """The scored tokens of one window.

    Attributes:
        nats: −ln p of each scored token, float64 [scored]; natural logarithm.
        hidden: final hidden states before the head as bfloat16 bits, uint16 [scored, hidden]; None unless
            the engine was asked to keep them.
    """

    index: int
    nats: NDArray[np.float64] = field(repr=False)
    hidden: NDArray[np.uint16] | None = field(default=None, repr=False)


class Scorer(Protocol):
    """A loaded model that scores windows of equal or unequal length."""

    @property
    def facts(self) -> ModelFacts: ...

    @property
    def load_s(self) -> float:
        """Seconds from the start of loading until ready."""
        ...

    def largest_batch(self, window: TokenWindow) -> int:
        """How many windows like this one fit in one forward pass, by measurement."""
        ...

    def score(self, windows: Sequence[TokenWindow]) -> list[WindowScore]:
        """Score one batch, in order.

        Raises:
            NonFiniteScore: a scored token has a log-probability that is not finite.
            OutOfMemory: the batch does not fit.
        """
        ...

    def save_head(self, path: Path) -> None:
        """Write the output head, which turns kept hidden states back into logits."""
        ...

    def expert_cache(self) -> CacheCounters | None:
        """Counts of the scored windows; None where every expert is resident."""
        ...

    def memory(self) -> Telemetry:
        """Peaks so far."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Generated:
    """One request and the times of its tokens, all by one monotonic clock of the measured process.

    Attributes:
        ids: greedy output tokens, int64 [output_len].
        submitted_s: when the request was handed to the engine.
        token_s: when each output token became visible, float64 [output_len]; tokens that arrive together
            share a time.
    """

    ids: NDArray[np.int64] = field(repr=False)
    submitted_s: float
    token_s: NDArray[np.float64] = field(repr=False)


class Generator(Protocol):
    """A loaded model that generates greedily."""

    @property
    def facts(self) -> ModelFacts: ...

    @property
    def load(self) -> LoadTimes: ...

    def generate(
        self, prompts: Sequence[NDArray[np.int64]], output_len: int, on_first_token: Callable[[], None]
    ) -> list[Generated]:
        """Send all prompts at once and wait for `output_len` tokens of each, in order.

        Args:
            prompts: token ids, one array a request.
            on_first_token: called once, when the first token of the last prompt has come: prefill is over.

        Raises:
            OutOfMemory, EngineDied, TimedOut: and the engine is then of no further use.
        """
        ...

    def resize_expert_cache(self, size: int | None) -> None:
        """Give every layer this many expert slots, None for all experts, and empty the caches.

        Raises:
            UsageError: the engine cannot without loading again, or the model has no experts.
        """
        ...

    def reset_counters(self) -> None:
        """Start counting expert-cache events and memory peaks anew."""
        ...

    def expert_cache(self) -> CacheCounters | None:
        """Counts since the last reset; None where every expert is resident."""
        ...

    def memory(self) -> EngineMemory: ...

    def close(self) -> None: ...
