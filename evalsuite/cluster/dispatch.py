"""The loop between the queue of blocks and the pool of workers. It knows neither Ray nor the disk.

Each turn takes every event that has come, writes what can leave in text order in one go, and feeds those who
are free. Its cost is a turn's, not a worker's: nothing in it looks at all workers or at all blocks.

A worker that neither answers nor dies is replaced once it has had its block for much longer than any took.
Where none has come back yet, nothing tells a stuck worker from a slow one, and all are left to work. Either
way it is said when nobody has answered for long.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evalsuite.cluster.blocks import Block, BlockQueue
from evalsuite.core.errors import EngineDied, EvalError, NonFiniteScore, OutOfMemory
from evalsuite.core.units import duration

SILENT_S = 900.0  # without an answer, before any block has come back
AGAIN = 4  # times as long before it is said once more


@dataclass(frozen=True)
class BlockScores:
    """What a worker returns for a block.

    Attributes:
        nats: Σ −ln p over the scored tokens of each window, in order.
        hidden: of each window as in `evalsuite.engines.base.WindowScore`, or empty.
    """

    nats: tuple[float, ...]
    hidden: tuple[NDArray[np.uint16], ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Joined:
    """A worker has loaded the model and is free."""

    worker: str


@dataclass(frozen=True)
class Scored:
    worker: str
    block: Block
    scores: BlockScores


@dataclass(frozen=True)
class Failed:
    """A worker could not score a block, and is free again."""

    worker: str
    block: Block
    error: EvalError


@dataclass(frozen=True)
class Left:
    """A worker is gone."""

    worker: str
    reason: str


Event = Joined | Scored | Failed | Left
Finished = tuple[Block, BlockScores]


class Pool(Protocol):
    """Workers that come and go."""

    def submit(self, worker: str, block: Block) -> None:
        """Give a block to a free worker."""
        ...

    def events(self) -> Sequence[Event]:
        """Wait for something to happen, but no longer than a second or so; then all that has.

        Raises:
            EvalError: no worker is left, and none will come.
        """
        ...

    def silent(self, workers: Sequence[str], silent_s: float, stuck_after_s: float | None) -> None:
        """Say that nobody has answered for so long.

        Args:
            workers: that have blocks.
            stuck_after_s: when they are replaced; None is never.
        """
        ...

    def replace(self, worker: str, reason: str) -> None:
        """End a worker that does not answer, and start another; no event tells of its end."""
        ...

    def now_s(self) -> float:
        """A clock that only goes forward."""
        ...


@dataclass
class Tally:
    """What the loop has seen.

    Attributes:
        windows: that each worker scored and that count.
        warnings: for the record.
    """

    windows: dict[str, int] = field(default_factory=dict[str, int])
    warnings: list[str] = field(default_factory=list[str])


@dataclass
class _Silence:
    """Since when nobody has answered, and how often that was said."""

    since_s: float
    said: int = 0

    def end(self, now_s: float) -> None:
        self.since_s, self.said = now_s, 0

    def tell(self, queue: BlockQueue[tuple[str, BlockScores]], pool: Pool, now_s: float) -> None:
        """Have it said half-way to when a worker is stuck, or after `SILENT_S`; again, ever more rarely."""
        if not queue.held:
            return
        after_s = queue.stuck_after_s(next(iter(queue.held.values())).block)
        due_s = SILENT_S if after_s is None else after_s / 2
        if now_s - self.since_s >= due_s * AGAIN**self.said:
            self.said += 1
            pool.silent(tuple(queue.held), now_s - self.since_s, after_s)


def dispatch(
    queue: BlockQueue[tuple[str, BlockScores]],
    pool: Pool,
    write: Callable[[Sequence[Finished]], None],
    tally: Tally,
    joined: Sequence[str] = (),
) -> None:
    """Hand out blocks until every window has been written.

    Args:
        write: gets blocks in text order, each once.
        tally: is kept up to date, whatever ends the loop.
        joined: workers that are free already.

    Raises:
        NonFiniteScore: a worker returned something that is no number; the message names it.
        OutOfMemory: one window alone does not fit.
        EngineDied: a block has cost several workers, or no worker is left.
        EvalError: whatever else a worker raised, with its name.
    """
    free: OrderedDict[str, None] = OrderedDict()
    events: deque[Event] = deque(Joined(worker) for worker in joined)
    silence = _Silence(pool.now_s())
    while not queue.finished:
        leaving: list[Finished] = []
        if events:
            silence.end(pool.now_s())
        try:
            for event in events:
                match event:
                    case Joined(worker):
                        queue.join()
                        free[worker] = None
                    case Scored(worker, block, scores):
                        _check(worker, block, scores)
                        free[worker] = None
                        for done, (by, found) in queue.done(worker, block, (worker, scores), pool.now_s()):
                            tally.windows[by] = tally.windows.get(by, 0) + done.windows
                            leaving.append((done, found))
                    case Failed(worker, block, error):
                        if not isinstance(error, OutOfMemory):
                            raise _named(worker, error)
                        size = queue.too_large(worker, block, error)
                        tally.warnings.append(
                            f"a batch of {block.batch} windows did not fit; went on with {size}"
                        )
                        free[worker] = None
                    case Left(worker, reason):
                        free.pop(worker, None)
                        queue.lost(worker, reason)
        finally:  # what ends the loop must not cost what came before it
            if leaving:
                write(leaving)
        for worker, held_s in queue.stuck(pool.now_s()).items():
            reason = f"it did not answer for {duration(held_s)}, and was ended"
            pool.replace(worker, reason)
            tally.warnings.append(f"{worker} was replaced: {reason}")
            queue.lost(worker, reason)
        silence.tell(queue, pool, pool.now_s())
        while free and (block := queue.take(next(iter(free)), pool.now_s())):
            worker, _ = free.popitem(last=False)
            pool.submit(worker, block)
        if not queue.finished:
            events = deque(pool.events())


def _check(worker: str, block: Block, scores: BlockScores) -> None:
    if len(scores.nats) != block.windows:
        raise EngineDied(
            f"{worker} returned {len(scores.nats)} windows of {block.windows}.",
            todo="see that every node has the same hlwq-eval.",
        )
    for place, nats in enumerate(scores.nats):
        if not math.isfinite(nats):
            raise NonFiniteScore(
                f"{worker} returned {nats} for window {block.start + place}.",
                cause="the weights or the device of that worker are damaged.",
                todo="take its node out and run the same command again; what is scored is kept.",
            )


def _named(worker: str, error: EvalError) -> EvalError:
    return type(error)(f"{worker}: {error.what}", cause=error.cause, todo=error.todo)
