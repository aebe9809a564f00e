"""Belady's optimum: evict the expert whose next use is farthest away, or that is never used again.

It has to know the future, so no engine can run it; it is the bound that a policy is judged by. Where every
step fits, no way to choose victims has fewer misses: L. A. Belady, A study of replacement algorithms for a
virtual-storage computer, IBM Systems Journal 5 (1966). Where a step overflows, the order of its groups
depends on what is resident, and this greedy choice is no longer proven to be the least.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalsuite.experts.policy import Policy

NEVER = np.iinfo(np.int64).max


class Belady(Policy):
    """Farthest next use first.

    Args:
        future: the distinct experts of every step that is going to be served, in order.
    """

    name = "belady"

    def __init__(self, slots: int, experts: int, future: Sequence[Sequence[int]]) -> None:
        super().__init__(slots, experts)
        self._future = [frozenset(wanted) for wanted in future]
        self._uses: list[list[int]] = [[] for _ in range(experts)]
        for step in range(len(future), 0, -1):
            for expert in self._future[step - 1]:
                self._uses[expert].append(step)

    def _begin(self, wanted: Sequence[int]) -> None:
        if self.step > len(self._future) or frozenset(wanted) != self._future[self.step - 1]:
            raise ValueError(f"step {self.step} needs other experts than the future that was given")
        for expert in wanted:
            self._uses[expert].pop()

    def _scores(self) -> NDArray[Any]:
        next_use = [NEVER if e < 0 or not self._uses[e] else self._uses[e][-1] for e in self.expert_in]
        return -np.asarray(next_use, np.int64)
