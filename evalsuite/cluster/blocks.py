"""Which windows are handed to whom: contiguous blocks, taken in text order by whoever is free.

A block is some whole batches of the run that one machine would make, so that every window shares its forward
pass with the same windows there and here. Results come back in any order and leave in text order, once each:
a block that two workers return counts once, and one whose worker is lost is handed out again. The earliest
block that is out holds back all later ones, so once it is late it goes to another free worker before any new
block, and to one more each time that it stays out twice as long. Who keeps a block for much longer than any
took is stuck, and can be replaced: its block is handed out again like that of a lost worker. No clock and no
Ray in here: the times are arguments.
"""

import heapq
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from evalsuite.core.errors import EngineDied, OutOfMemory

Result = TypeVar("Result")

TARGET_S = 2.0  # how long a block shall take: long against a message, short against a run
MOST_BATCHES = 64
SHARE = 4  # towards the end a block is no more than this part of what each worker has left to do
LATE, PATIENCE_S = 3.0, 10.0  # a block so many times slower than expected, and so old, gets another worker
STUCK, STUCK_S = 10.0, 600.0  # who has a block so many times longer than expected, and so long, is stuck
MOST_HELD = 1 << 18  # finished windows, without hidden states, that wait for an earlier block
MOST_LOSSES = 3  # workers that one block may cost


@dataclass(frozen=True)
class Block:
    """Windows `start` to `stop`, exclusive, in batches of `batch` that begin at `start`."""

    start: int
    stop: int
    batch: int

    @property
    def windows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Held:
    """A block that a worker has, and since when."""

    block: Block
    since_s: float


@dataclass
class _Running:
    block: Block
    began_s: dict[str, float]  # by worker


class BlockQueue(Generic[Result]):
    """The windows of a run from the first that is not on the disk yet.

    Args:
        total: windows of the run.
        done: of these, already on the disk.
        batch: windows a batch.
        held: finished windows that may wait for an earlier block; beyond it, free workers repeat that block.
        most_batches: in a block.
        patience_s: how old a block must be before a second worker may be put on it; twice that for a third
            one after the second, and so on.

    Attributes:
        frontier: the first window that has not left in text order.
        repeats: results that came a second time and were dropped.
    """

    def __init__(
        self,
        total: int,
        done: int,
        batch: int,
        *,
        held: int = MOST_HELD,
        most_batches: int = MOST_BATCHES,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.total, self.frontier, self.batch = total, done, batch
        self.repeats = 0
        self._most_waiting, self._most, self._patience_s = held, most_batches, patience_s
        self._next = done
        self._returned: list[tuple[int, Block]] = []
        self._running: dict[int, _Running] = {}
        self._order: OrderedDict[int, None] = OrderedDict()  # of these, by when their last worker began
        self._held: dict[str, Held] = {}  # by worker; who has had his for longest is first
        self._ready: dict[int, tuple[Block, Result]] = {}
        self._waiting = 0  # windows in there
        self._losses: Counter[int] = Counter()
        self._pace_s: float | None = None  # of one window, on one worker
        self._workers = 0

    @property
    def finished(self) -> bool:
        return self.frontier >= self.total

    @property
    def held(self) -> Mapping[str, Held]:
        """What each worker has, longest first."""
        return self._held

    def join(self) -> None:
        """A worker more."""
        self._workers += 1

    def take(self, worker: str, now_s: float) -> Block | None:
        """The next block for a free worker; None while there is nothing that it could do."""
        if self._returned:
            _, block = heapq.heappop(self._returned)
        elif self._late(self.frontier, now_s):
            block = self._running[self.frontier].block
        elif self._next < self.total and self._waiting < self._most_waiting:
            block = self._cut()
        elif self._late(oldest := next(iter(self._order), self.total), now_s):
            block = self._running[oldest].block
        else:
            return None
        return self._give(block, worker, now_s)

    def _give(self, block: Block, worker: str, now_s: float) -> Block:
        block = Block(block.start, block.stop, min(block.batch, self.batch))
        running = self._running.setdefault(block.start, _Running(block, {}))
        running.began_s[worker] = now_s
        self._order[block.start] = None
        self._order.move_to_end(block.start)
        self._held[worker] = Held(block, now_s)
        return block

    def _cut(self) -> Block:
        batches = 1
        if self._pace_s is not None:
            in_time = int(TARGET_S / (self._pace_s * self.batch)) if self._pace_s > 0 else self._most
            fair = (self.total - self._next) // (SHARE * max(1, self._workers) * self.batch)
            batches = max(1, min(in_time, fair, self._most))
        start = self._next
        self._next = min(start + batches * self.batch, self.total)
        return Block(start, self._next, self.batch)

    def _late(self, start: int, now_s: float) -> bool:
        """Whether the block that begins there is out for so long that another worker shall try it."""
        running = self._running.get(start)
        if running is None or self._pace_s is None:
            return False
        patience_s = max(LATE * self._pace_s * running.block.windows, self._patience_s)
        return now_s - max(running.began_s.values()) >= patience_s * 2 ** (len(running.began_s) - 1)

    def done(self, worker: str, block: Block, result: Result, now_s: float) -> list[tuple[Block, Result]]:
        """A result; returns all that can leave now, in text order."""
        self._held.pop(worker, None)
        running = self._running.pop(block.start, None)
        if running is None:
            self.repeats += 1
            return []
        del self._order[block.start]
        if worker in running.began_s:
            pace_s = (now_s - running.began_s[worker]) / block.windows
            self._pace_s = pace_s if self._pace_s is None else 0.9 * self._pace_s + 0.1 * pace_s
        self._ready[block.start] = (block, result)
        self._waiting += block.windows
        leaving: deque[tuple[Block, Result]] = deque()
        while found := self._ready.pop(self.frontier, None):
            leaving.append(found)
            self.frontier = found[0].stop
            self._waiting -= found[0].windows
        return list(leaving)

    def stuck_after_s(self, block: Block) -> float | None:
        """How long a worker may have a block; None while none has come back, and any may be as slow."""
        return None if self._pace_s is None else max(STUCK * self._pace_s * block.windows, STUCK_S)

    def stuck(self, now_s: float) -> dict[str, float]:
        """Workers that have had a block for too long, and for how long each; `lost` takes it from them."""
        found: dict[str, float] = {}
        for worker, held in self._held.items():
            after_s = self.stuck_after_s(held.block)
            if after_s is None or now_s - held.since_s < after_s:
                break
            found[worker] = now_s - held.since_s
        return found

    def lost(self, worker: str, reason: str) -> None:
        """A worker is gone, and what it was doing is to be done by another.

        Raises:
            EngineDied: the same block has cost several workers.
        """
        self._workers -= 1
        if (block := self._give_back(worker)) is None:
            return
        self._losses[block.start] += 1
        if self._losses[block.start] >= MOST_LOSSES:
            raise EngineDied(
                f"Windows {block.start} to {block.stop - 1} ended {MOST_LOSSES} workers one after the other.",
                cause=reason,
                todo="score them on one machine, without --cluster, to see why; what is scored is kept.",
            )

    def too_large(self, worker: str, block: Block, error: OutOfMemory) -> int:
        """A batch did not fit: this block and all later ones are made of smaller ones, whose size returns.

        Raises:
            OutOfMemory: one window alone does not fit.
        """
        if block.batch == 1:
            raise error
        self.batch = min(self.batch, block.batch // 2)
        self._give_back(worker)
        return self.batch

    def _give_back(self, worker: str) -> Block | None:
        """Put the worker's block back, and return it, unless another one has it too."""
        held = self._held.pop(worker, None)
        running = None if held is None else self._running.get(held.block.start)
        if held is None or running is None or worker not in running.began_s:
            return None
        start = held.block.start
        del running.began_s[worker]
        if running.began_s:
            return None
        del self._running[start], self._order[start]
        heapq.heappush(self._returned, (start, running.block))
        return running.block
