"""What an engine that records routing is to the rest of the suite."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class RoutedPass:
    """One forward pass: who was in it, and what each of its tokens chose.

    Attributes:
        request, position: of each token, int64 [tokens].
        prefill: the pass took prompts, not decoded tokens.
        chosen: int64 [tokens, layers, top_k].
    """

    request: NDArray[np.int64] = field(repr=False)
    position: NDArray[np.int64] = field(repr=False)
    prefill: bool
    chosen: NDArray[np.int64] = field(repr=False)


class RoutingRecorder(Protocol):
    """A loaded model that generates greedily and tells which experts each token chose."""

    @property
    def name(self) -> str:
        """The engine, with its version."""
        ...

    @property
    def computed(self) -> str:
        """The arithmetic, such as ``bfloat16 on cpu``."""
        ...

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the decoder layers that have experts."""
        ...

    def record(self, prompts: Sequence[NDArray[np.int64]], output_len: int, first: int) -> list[RoutedPass]:
        """Run prompts of one length at once: a prefill, and `output_len` − 1 decoded tokens of each.

        The last token that is generated goes through no layer, and is in no pass.

        Args:
            first: number of the first of these requests.

        Raises:
            MeasurementError: the passes were not those that were asked for.
            OutOfMemory: they do not fit.
        """
        ...

    def close(self) -> None: ...
