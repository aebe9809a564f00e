"""What every cache size and policy would have counted on a trace.

The rules are those of `evalsuite.experts.policy`, compiled: hits first, ascending, groups on overflow, every
expert of a step counted once as a hit or a miss. Within a group the victims do not depend on one another, so
one scan over the slots finds all of them: those with the least (score, last use, slot).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from evalsuite.core.cache import CacheCounters, LayerCounters
from evalsuite.core.errors import UsageError
from evalsuite.experts.belady import Belady
from evalsuite.experts.policy import EMPTY, POLICIES
from evalsuite.experts.trace import PHASES, Phase, Trace

CODES = {"lru": 0, "lfu": 1, "fifo": 2, "slru": 3, "lfru": 4, Belady.name: 5}
LRU, LFU, FIFO, SLRU, LFRU, BELADY = range(6)
STORE = "simulated"


@dataclass(frozen=True)
class LayerSteps:
    """One layer's steps, one behind the other.

    Attributes:
        starts: int64 [steps + 1]; step i needs ``wanted[starts[i]:starts[i + 1]]``.
        wanted: distinct experts of each step, ascending, int32.
        next_use: the step at which each of them is wanted again, int64; the number of steps if never.
    """

    experts: int
    starts: NDArray[np.int64]
    wanted: NDArray[np.int32]
    next_use: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1


@dataclass(frozen=True)
class Counts:
    """One layer under one policy and size, step by step.

    Attributes:
        misses: int32 [steps]; a step's hits are its distinct experts less its misses.
        loads: (expert, slot, evicted expert or EMPTY) of each miss in order, int32 [misses, 3]; empty unless
            asked for.
    """

    misses: NDArray[np.int32]
    loads: NDArray[np.int32]


def layer_steps(trace: Trace) -> list[LayerSteps]:
    """The distinct experts of each step, for each layer of the trace."""
    starts, experts = trace.starts(), trace.facts.geometry.experts
    return [
        _layer_steps(np.ascontiguousarray(trace.chosen[:, layer]).astype(np.int32), starts, experts)
        for layer in range(len(trace.facts.layers))
    ]


def steps_of(sets: Sequence[Sequence[int]], experts: int) -> LayerSteps:
    """The same from a list of sets."""
    starts = np.concatenate([[0], np.cumsum([len(wanted) for wanted in sets])]).astype(np.int64)
    flat = np.asarray([expert for wanted in sets for expert in wanted], np.int32)
    return _layer_steps(flat[:, None], starts, experts)


def _layer_steps(chosen: NDArray[np.int32], token_starts: NDArray[np.int64], experts: int) -> LayerSteps:
    starts, wanted = _distinct(chosen, token_starts, experts)
    return LayerSteps(experts, starts, wanted, _next_uses(starts, wanted, experts))


def count(layer: LayerSteps, policy: str, slots: int, *, record_loads: bool = False) -> Counts:
    """Run one layer's cache over its steps.

    Raises:
        UsageError: there is no such policy, or no slot.
    """
    check_policies([policy])
    check_sizes([slots])
    log = np.empty((len(layer.wanted) if record_loads else 0, 3), np.int32)
    misses: Any = _simulate(
        CODES[policy],
        min(slots, layer.experts),
        layer.experts,
        layer.starts,
        layer.wanted,
        layer.next_use,
        log,
    )
    return Counts(misses, log[: int(misses.sum()) if record_loads else 0])


def simulate(
    trace: Trace, policy: str, size: int, layers: Sequence[LayerSteps]
) -> dict[Phase, CacheCounters]:
    """Counters of every layer, for decode and prefill apart and together.

    The cache is never emptied: a phase begins with what the phases before it left resident.

    Args:
        layers: `layer_steps` of the trace, which all sizes and policies share.
    """
    prefill = trace.step_is_prefill()
    chosen: dict[Phase, NDArray[np.bool_]] = {
        "decode": ~prefill, "prefill": prefill, "all": np.ones(len(prefill), np.bool_)
    }  # fmt: skip
    counters: dict[Phase, list[LayerCounters]] = {phase: [] for phase in PHASES}
    for number, layer in zip(trace.facts.layers, layers, strict=True):
        misses, distinct = count(layer, policy, size).misses, np.diff(layer.starts)
        overflow = distinct > size
        for phase, steps in chosen.items():
            missed = int(misses[steps].sum())
            counters[phase].append(
                LayerCounters(
                    layer=number,
                    steps=int(steps.sum()),
                    hits=int(distinct[steps].sum()) - missed,
                    misses=missed,
                    overflow_steps=int(overflow[steps].sum()),
                    bytes_moved=missed * trace.facts.geometry.expert_bytes,
                )
            )
    return {
        phase: CacheCounters(
            size=size, experts=trace.facts.geometry.experts, policy=policy, store=STORE,
            expert_bytes=trace.facts.geometry.expert_bytes, layers=tuple(counters[phase]),
        )
        for phase in PHASES
    }  # fmt: skip


def check_policies(names: Sequence[str]) -> None:
    """Raises UsageError unless the simulator knows every one of them."""
    for name in names:
        if name not in CODES:
            raise UsageError(
                f"No cache policy is called {name!r}.",
                todo=f"choose from {', '.join([*POLICIES, Belady.name])}.",
            )


def check_sizes(sizes: Sequence[int]) -> None:
    """Raises UsageError unless every size is at least 1."""
    for size in sizes:
        if size < 1:
            raise UsageError(
                f"An expert cache of {size} experts holds none.", todo="give sizes of at least 1, or all."
            )


@njit(cache=True)
def _distinct(chosen: Any, token_starts: Any, experts: int) -> Any:  # pragma: no cover (compiled)
    steps = len(token_starts) - 1
    starts = np.zeros(steps + 1, np.int64)
    wanted = np.empty(chosen.size, np.int32)
    seen = np.full(experts, -1, np.int64)
    total = 0
    for step in range(steps):
        begin = total
        for token in range(token_starts[step], token_starts[step + 1]):
            for k in range(chosen.shape[1]):
                expert = chosen[token, k]
                if seen[expert] != step:
                    seen[expert] = step
                    wanted[total] = expert
                    total += 1
        wanted[begin:total].sort()
        starts[step + 1] = total
    return starts, wanted[:total].copy()


@njit(cache=True)
def _next_uses(starts: Any, wanted: Any, experts: int) -> Any:  # pragma: no cover (compiled)
    steps = len(starts) - 1
    following = np.full(experts, steps, np.int64)
    found = np.empty(len(wanted), np.int64)
    for step in range(steps - 1, -1, -1):
        for i in range(starts[step], starts[step + 1]):
            found[i] = following[wanted[i]]
            following[wanted[i]] = step
    return found


@njit(cache=True)
def _simulate(
    policy: int, slots: int, experts: int, starts: Any, wanted: Any, next_use: Any, log: Any
) -> Any:  # pragma: no cover (compiled)
    steps = len(starts) - 1
    misses = np.zeros(steps, np.int32)
    slot_of = np.full(experts, EMPTY, np.int32)
    expert_in = np.full(slots, EMPTY, np.int32)
    last_used = np.zeros(slots, np.int64)
    pinned_in = np.zeros(slots, np.int64)  # number of the group that pins the slot
    # what the score is made of, where the policy needs it; for slru, `key` is the time of coming on probation
    uses = np.zeros(slots, np.int64)
    key = np.zeros(slots, np.int64)
    frequency = np.zeros(slots, np.float32)
    protected = np.zeros(slots, np.bool_)
    room, members, age, loads, filled, group = slots // 2, 0, 0, 0, 0, 0
    decay, one, cap = np.float32(0.95), np.float32(1), np.float32(20)

    order = np.empty(experts, np.int64)  # positions in `wanted`: residents first
    victims = np.empty(slots, np.int64)
    worth = np.empty(slots, np.float64)
    for step in range(steps):
        now = step + 1
        begin, end = starts[step], starts[step + 1]
        resident = 0
        for i in range(begin, end):
            if slot_of[wanted[i]] != EMPTY:
                order[resident] = i
                resident += 1
        absent = resident
        for i in range(begin, end):
            if slot_of[wanted[i]] == EMPTY:
                order[absent] = i
                absent += 1
        misses[step] = absent - resident

        for first in range(0, absent, slots):
            last = min(first + slots, absent)
            group += 1
            for j in range(first, min(last, resident)):
                i = order[j]
                slot = slot_of[wanted[i]]
                pinned_in[slot] = group
                if policy == LFU:
                    uses[slot] += 1
                    key[slot] = uses[slot] + age
                elif policy == BELADY:
                    key[slot] = -next_use[i]
                elif policy == LFRU:
                    frequency[slot] = min(decay * frequency[slot] + one, cap)
                elif policy == SLRU and room == 0:
                    key[slot] = now
                elif policy == SLRU:
                    if not protected[slot]:
                        protected[slot] = True
                        members += 1
                    if members > room:
                        oldest = -1
                        for s in range(slots):
                            if (
                                protected[s]
                                and s != slot
                                and (oldest < 0 or last_used[s] < last_used[oldest])
                            ):
                                oldest = s
                        protected[oldest] = False
                        key[oldest] = now
                        members -= 1
                last_used[slot] = now

            missing = last - max(first, resident)
            taken = min(missing, slots - filled)
            needed = missing - taken
            found = 0
            if needed > 0:
                for s in range(slots):
                    if pinned_in[s] == group or expert_in[s] == EMPTY:
                        continue
                    if policy == LRU:
                        value = np.float64(last_used[s])
                    elif policy == LFRU:
                        value = np.float64(frequency[s] / np.float32(1 + now - last_used[s]))
                    elif policy == SLRU:
                        value = np.float64(last_used[s] + now + 1 if protected[s] else key[s])
                    else:
                        value = np.float64(key[s])
                    if found == needed:
                        worst = victims[found - 1]
                        if value > worth[found - 1] or (
                            value == worth[found - 1] and last_used[s] >= last_used[worst]
                        ):
                            continue
                        found -= 1
                    place = found
                    while place > 0 and (
                        value < worth[place - 1]
                        or (value == worth[place - 1] and last_used[s] < last_used[victims[place - 1]])
                    ):
                        worth[place], victims[place] = worth[place - 1], victims[place - 1]
                        place -= 1
                    worth[place], victims[place] = value, s
                    found += 1

            for m in range(missing):
                i = order[last - missing + m]
                expert = wanted[i]
                if m < taken:
                    slot = filled
                    filled += 1
                else:
                    slot = victims[m - taken]
                    slot_of[expert_in[slot]] = EMPTY
                    if policy == LFU:
                        age = key[slot]
                    elif policy == SLRU and protected[slot]:
                        protected[slot] = False
                        members -= 1
                if len(log) > 0:
                    log[loads, 0], log[loads, 1], log[loads, 2] = expert, slot, expert_in[slot]
                loads += 1
                expert_in[slot] = expert
                slot_of[expert] = slot
                pinned_in[slot] = group
                last_used[slot] = now
                if policy == LFU:
                    uses[slot] = 1
                    key[slot] = 1 + age
                elif policy == FIFO:
                    key[slot] = loads
                elif policy == SLRU:
                    key[slot] = now
                elif policy == BELADY:
                    key[slot] = -next_use[i]
                elif policy == LFRU:
                    frequency[slot] = one
    return misses
