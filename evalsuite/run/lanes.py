"""Jobs on several GPUs at once: each GPU has one job at a time, and jobs start in the order given."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

Job = TypeVar("Job")
POLL_S = 0.2  # how long a Ctrl-C may wait


@dataclass(frozen=True)
class Claim(Generic[Job]):
    """A job and the GPUs that it needs for itself; with none it runs alone."""

    gpus: tuple[int, ...]
    job: Job

    def conflicts(self, other: "Claim[Job]") -> bool:
        return not self.gpus or not other.gpus or bool(set(self.gpus) & set(other.gpus))


@dataclass
class _Running(Generic[Job]):
    """A job under way, and the GPUs that others have had since it was last asked for them."""

    claim: Claim[Job]
    beside: set[int]


class Lanes(Generic[Job]):
    """Runs jobs in threads, one for each GPU.

    Args:
        work: carries out a job; can ask which GPUs other jobs have had since it last asked, at first since
            it began.
        stop: set when no further job may begin, because of Ctrl-C or an error.
        abort: ends what runs at once; called in the main thread after `stop` is set.
    """

    def __init__(
        self,
        work: Callable[[Job, Callable[[], tuple[int, ...]]], None],
        stop: threading.Event,
        abort: Callable[[], None],
    ) -> None:
        self._work, self._stop, self._abort = work, stop, abort
        self._change = threading.Condition()
        self._pending: list[Claim[Job]] = []
        self._running: list[_Running[Job]] = []

    def run(self, claims: Sequence[Claim[Job]]) -> None:
        """Carry out all jobs.

        Raises:
            BaseException: the first that a job raised, or the KeyboardInterrupt that arrived; all others
                are ended before.
        """
        self._pending = list(claims)
        count = max(1, len({gpu for claim in claims for gpu in claim.gpus}))
        with ThreadPoolExecutor(count, "lane") as threads:
            lanes = [threads.submit(self._lane) for _ in range(count)]
            try:
                self._wait(lanes)
            finally:
                self._stop.set()
                with self._change:
                    self._change.notify_all()
                if not all(lane.done() for lane in lanes):
                    self._abort()
        for lane in lanes:
            lane.result()

    def _wait(self, lanes: Sequence[Future[None]]) -> None:
        while True:
            done, waiting = wait(lanes, POLL_S, FIRST_EXCEPTION)
            if not waiting or any(lane.exception() for lane in done):
                return

    def _lane(self) -> None:
        while (running := self._next()) is not None:
            try:
                self._work(running.claim.job, partial(self._beside, running))
            finally:
                with self._change:
                    self._running = [other for other in self._running if other is not running]
                    self._change.notify_all()

    def _next(self) -> _Running[Job] | None:
        with self._change:
            while self._pending and not self._stop.is_set():
                for claim in self._pending:
                    if not any(claim.conflicts(other.claim) for other in self._running):
                        self._pending.remove(claim)
                        return self._begin(claim)
                self._change.wait()
            return None

    def _begin(self, claim: Claim[Job]) -> _Running[Job]:
        for other in self._running:
            other.beside.update(claim.gpus)
        running = _Running(claim, {gpu for other in self._running for gpu in other.claim.gpus})
        self._running.append(running)
        return running

    def _beside(self, running: _Running[Job]) -> tuple[int, ...]:
        with self._change:
            found = tuple(sorted(running.beside))
            running.beside = {
                gpu for other in self._running if other is not running for gpu in other.claim.gpus
            }
            return found
