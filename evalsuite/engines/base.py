"""What an engine is to the rest of the suite."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evalsuite.core.record import ModelFacts, Telemetry
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

    def memory(self) -> Telemetry:
        """Peaks so far."""
        ...

    def close(self) -> None: ...
