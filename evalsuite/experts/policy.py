"""Which experts of a layer stay on the device: slots, and who leaves when a slot is needed.

A *step* is one call of a layer's experts, with a set of distinct experts that it needs. The rules that every
policy shares, so that a simulator, the torch engine and a kernel on the GPU count alike:

1. The experts of the running step are pinned: none of them can be evicted before the step is over, and two
   experts never share a slot.
2. Hits are noted first, in ascending order of expert; then misses are placed in ascending order, each into
   the lowest empty slot, or else into the slot of the victim.
3. The victim has the lowest score among slots that are not pinned; ties go to the slot used longest ago,
   then to the lowest slot.
4. A step with more distinct experts than slots is an *overflow* step: it is served in groups of at most as
   many experts as there are slots, residents first, then the others, both in ascending order. Each group is
   pinned while it runs; to the policy all groups of a step are at the same time.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalsuite.core.errors import UsageError

EMPTY = -1
LFRU_DECAY, LFRU_CAP = np.float32(0.95), np.float32(20)


@dataclass(frozen=True)
class Placement:
    """Where the experts of one group are, and what has to be copied before it runs.

    Attributes:
        slots: slot of each expert of the group, expert to slot.
        loads: (expert, slot) for each miss, in the order in which they were placed.
        evicted: the expert that each load displaced, EMPTY where the slot was free.
    """

    slots: dict[int, int]
    loads: tuple[tuple[int, int], ...]
    evicted: tuple[int, ...]

    @property
    def hits(self) -> int:
        return len(self.slots) - len(self.loads)


class Policy(ABC):
    """The slots of one layer. Subclasses say what a score is; the rest is shared.

    Args:
        slots: how many experts fit; at least 1.
        experts: how many the layer has; more slots than experts stay empty.
    """

    name: str

    def __init__(self, slots: int, experts: int) -> None:
        if slots < 1:
            raise ValueError(f"a cache needs at least one slot, not {slots}")
        self.slots, self.experts = slots, experts
        self.slot_of = np.full(experts, EMPTY, np.int32)
        self.expert_in = np.full(slots, EMPTY, np.int32)
        self.last_used = np.zeros(slots, np.int64)
        self.step = 0

    def serve(self, wanted: Sequence[int]) -> Iterator[Placement]:
        """Place the experts of one step, a group at a time; a group is pinned until the next is asked for.

        Args:
            wanted: distinct experts, in any order.
        """
        self.step += 1
        self._begin(wanted)
        resident = sorted(e for e in wanted if self.slot_of[e] != EMPTY)
        absent = sorted(e for e in wanted if self.slot_of[e] == EMPTY)
        order = resident + absent
        for start in range(0, len(order), self.slots):
            yield self._place(order[start : start + self.slots])

    def _place(self, group: list[int]) -> Placement:
        pinned = np.zeros(self.slots, np.bool_)
        missing: list[int] = []
        for expert in group:
            slot = int(self.slot_of[expert])
            if slot == EMPTY:
                missing.append(expert)
                continue
            pinned[slot] = True
            self._on_hit(slot)
            self.last_used[slot] = self.step
        loads: list[tuple[int, int]] = []
        evicted: list[int] = []
        for expert in missing:
            slot = self._free_slot(pinned)
            evicted.append(int(self.expert_in[slot]))
            if evicted[-1] != EMPTY:
                self.slot_of[evicted[-1]] = EMPTY
            self.expert_in[slot], self.slot_of[expert] = expert, slot
            pinned[slot] = True
            self._on_load(slot)
            self.last_used[slot] = self.step
            loads.append((expert, slot))
        return Placement({e: int(self.slot_of[e]) for e in group}, tuple(loads), tuple(evicted))

    def _free_slot(self, pinned: NDArray[np.bool_]) -> int:
        empty = np.flatnonzero(self.expert_in == EMPTY)
        if len(empty):
            return int(empty[0])
        candidates = np.flatnonzero(~pinned)
        scores = self._scores()[candidates]
        lowest = candidates[scores == scores.min()]
        slot = int(lowest[np.argmin(self.last_used[lowest])])
        self._on_evict(slot)
        return slot

    def _begin(self, wanted: Sequence[int]) -> None:  # noqa: B027 (a hook that may stay empty)
        """A step begins; `step` is its number."""

    def _on_hit(self, slot: int) -> None:  # noqa: B027 (a hook that may stay empty)
        """The expert in `slot` is used again; `last_used` still holds the time before."""

    def _on_load(self, slot: int) -> None:  # noqa: B027 (a hook that may stay empty)
        """A new expert has come into `slot`."""

    def _on_evict(self, slot: int) -> None:  # noqa: B027 (a hook that may stay empty)
        """The expert in `slot` is about to leave."""

    @abstractmethod
    def _scores(self) -> NDArray[Any]:
        """The worth of keeping each slot, shape [slots]."""


class LRU(Policy):
    """Least recently used."""

    name = "lru"

    def _scores(self) -> NDArray[Any]:
        return self.last_used


class FIFO(Policy):
    """First in, first out: hits count for nothing."""

    name = "fifo"

    def __init__(self, slots: int, experts: int) -> None:
        super().__init__(slots, experts)
        self.loaded = np.zeros(slots, np.int64)
        self._loads = 0

    def _on_load(self, slot: int) -> None:
        self._loads += 1
        self.loaded[slot] = self._loads

    def _scores(self) -> NDArray[Any]:
        return self.loaded


class LFU(Policy):
    """Least frequently used, with dynamic ageing.

    A slot's key is its count plus the key of the last victim at the time of its last use, so that experts
    that were popular long ago grow old. LFUDA of Arlitt, Cherkasova, Dilley, Friedrich and Jin, Evaluating
    Content Management Techniques for Web Proxy Caches, Performance Evaluation Review 27 (2000).
    """

    name = "lfu"

    def __init__(self, slots: int, experts: int) -> None:
        super().__init__(slots, experts)
        self.count = np.zeros(slots, np.int64)
        self.key = np.zeros(slots, np.int64)
        self._age = 0

    def _on_hit(self, slot: int) -> None:
        self.count[slot] += 1
        self.key[slot] = self.count[slot] + self._age

    def _on_load(self, slot: int) -> None:
        self.count[slot] = 1
        self.key[slot] = 1 + self._age

    def _on_evict(self, slot: int) -> None:
        self._age = int(self.key[slot])

    def _scores(self) -> NDArray[Any]:
        return self.key


class SegmentedLRU(Policy):
    """Segmented LRU: newcomers are on probation, and a hit moves them into a protected half.

    When the protected segment is full its least recently used member goes back on probation, as if it had
    just come. Karedla, Love and Wherry, Caching Strategies to Improve Disk System Performance, IEEE Computer
    27 (1994).
    """

    name = "slru"

    def __init__(self, slots: int, experts: int) -> None:
        super().__init__(slots, experts)
        self.protected = np.zeros(slots, np.bool_)
        self.on_probation_since = np.zeros(slots, np.int64)
        self._room = slots // 2

    def _on_hit(self, slot: int) -> None:
        self.on_probation_since[slot] = self.step
        if self._room == 0:
            return
        self.protected[slot] = True
        members = np.flatnonzero(self.protected)
        if len(members) > self._room:
            others = members[members != slot]
            oldest = others[np.argmin(self.last_used[others])]
            self.protected[oldest] = False
            self.on_probation_since[oldest] = self.step

    def _on_load(self, slot: int) -> None:
        self.protected[slot] = False
        self.on_probation_since[slot] = self.step

    def _scores(self) -> NDArray[Any]:
        return np.where(self.protected, self.last_used + self.step + 1, self.on_probation_since)


class LFRU(Policy):
    """Frequency over recency, as a public fork of vLLM has it.

    On each use, frequency = min(0.95 · frequency + 1, 20); the score is frequency / (1 + steps since the last
    use), in float32. A newcomer starts with a frequency of 1.
    """

    name = "lfru"

    def __init__(self, slots: int, experts: int) -> None:
        super().__init__(slots, experts)
        self.frequency = np.zeros(slots, np.float32)

    def _on_hit(self, slot: int) -> None:
        self.frequency[slot] = min(LFRU_DECAY * self.frequency[slot] + np.float32(1), LFRU_CAP)

    def _on_load(self, slot: int) -> None:
        self.frequency[slot] = 1

    def _scores(self) -> NDArray[Any]:
        return self.frequency / (1 + self.step - self.last_used).astype(np.float32)


POLICIES: dict[str, type[Policy]] = {p.name: p for p in (LRU, LFU, FIFO, SegmentedLRU, LFRU)}


def make_policy(name: str, slots: int, experts: int) -> Policy:
    """The policy called `name` over `slots` slots.

    Raises:
        UsageError: there is none of that name, or no slot.
    """
    if name not in POLICIES:
        raise UsageError(f"No cache policy is called {name!r}.", todo=f"choose one of {', '.join(POLICIES)}.")
    if slots < 1:
        raise UsageError(
            f"An expert cache of {slots} experts holds none.", todo="give a size of at least 1, or all."
        )
    return POLICIES[name](slots, experts)
