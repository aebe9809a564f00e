"""Watch a process tree and the machine under it while something runs.

    with Watch(folder, pid=engine.pid, gpus=[0], files={"checkpoint": weights}) as watch:
        watch.phase("load")
        ...
    telemetry = watch.summary()

Three threads of the watching process sample. The first reads the process tree and the GPUs `hz` times a
second. The others read once a second, and sooner after a phase begins, what the kernel has to walk lists of
pages for: PSS, which holds a lock of the measured process meanwhile and therefore gets at most a fiftieth of
the time; and page cache and disk. What is watched is asked nothing and may die at any time: its series end
there.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from evalsuite.core.telemetry import Phase, Series, Telemetry
from evalsuite.telemetry.disk import DiskProbe
from evalsuite.telemetry.gpu import GpuProbe
from evalsuite.telemetry.pagecache import FileProbe, Places
from evalsuite.telemetry.process import COUNTERS, ProcessProbe, ProcessTree, SharedMemoryProbe
from evalsuite.telemetry.sampler import Sampler
from evalsuite.telemetry.samples import PARQUET, Row, SampleFile

FAST_SHARE, PAGES_SHARE, FILES_SHARE = 0.1, 0.02, 0.1
SLOW_PERIOD_S = 1.0
OF_THE_TREE = ("rss_bytes", "pss_bytes", "uss_bytes", "shared_bytes", *COUNTERS)


class Watch:
    """Samples from `__enter__` to `__exit__`, and the summary of them.

    Args:
        out: folder that ``telemetry.parquet`` is written to.
        pid: root of the process tree, or a function that gives it once there is one.
        gpus: NVML indices of the devices that it may use; begin to watch before it does, so that what others
            do there is told apart.
        files: name to files and folders (`FileProbe` has more) whose page cache and disk space are followed.
        hz: fast samples a second.
        clock: monotonic seconds.
        no_process: why there is no process to watch, where there will be none.
    """

    def __init__(
        self,
        out: Path,
        pid: int | Callable[[], int | None],
        gpus: Sequence[int] = (),
        files: Mapping[str, Places] | None = None,
        hz: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        no_process: str | None = None,
    ) -> None:
        self._tree = ProcessTree(pid)
        self._no_process = no_process or "the measured process ended before it could be read"
        self._in_process = pid == os.getpid()
        self._clock, self._began_s = clock, clock()
        self._file = SampleFile(out)
        self._phases: list[Phase] = []
        self._current: tuple[str, float] | None = None
        self._tallies: dict[str, _Tally] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        slow_s = max(SLOW_PERIOD_S, 1 / hz)
        self._gpus = GpuProbe(gpus, self._tree)
        fast = (ProcessProbe(self._tree), self._gpus)
        slow = (FileProbe(files or {}), DiskProbe(out))
        self._fast = Sampler(fast, 1 / hz, FAST_SHARE, self._note, clock)
        self._slow = (
            Sampler((SharedMemoryProbe(self._tree),), slow_s, PAGES_SHARE, self._note, clock),
            Sampler(slow, slow_s, FILES_SHARE, self._note, clock),
        )
        self._wakes = tuple(threading.Event() for _ in self._slow)
        self._threads = ThreadPoolExecutor(1 + len(self._slow), "watch")
        self._running: list[Future[None]] = []

    @property
    def spent_s(self) -> float:
        """Seconds that taking samples took, all threads together."""
        return sum(sampler.spent_s for sampler in self._samplers)

    @property
    def _samplers(self) -> tuple[Sampler, ...]:
        return (self._fast, *self._slow)

    @property
    def samples(self) -> int:
        """Fast samples so far."""
        return self._fast.samples

    def __enter__(self) -> Self:
        for sampler in self._samplers:
            sampler.take()
        self._running = [
            self._threads.submit(self._fast.run, self._stop.wait),
            *(
                self._threads.submit(sampler.run, partial(self._wait_or_wake, wake))
                for sampler, wake in zip(self._slow, self._wakes, strict=True)
            ),
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._wake()
        self._threads.shutdown()
        self.end_phase()
        self._file.finish()
        for sampler in self._samplers:
            sampler.close()
        if error is None:
            for thread in self._running:
                thread.result()

    def phase(self, name: str) -> None:
        """A stretch of this name begins, and the one before ends; both get a sample at this moment."""
        self._fast.take()
        now = self._clock()
        with self._lock:
            self._end_phase(now)
            self._current = (name, now)
        self._wake()

    def end_phase(self) -> None:
        """The running phase ends with a sample, and none begins."""
        self._fast.take()
        with self._lock:
            self._end_phase(self._clock())

    def _end_phase(self, now: float) -> None:
        if self._current is not None:
            name, start = self._current
            self._phases.append(Phase(name=name, start_s=start - self._began_s, stop_s=now - self._began_s))
            self._current = None

    def _wake(self) -> None:
        for wake in self._wakes:
            wake.set()

    def _wait_or_wake(self, wake: threading.Event, seconds: float) -> bool:
        wake.wait(seconds)
        wake.clear()
        return self._stop.is_set()

    def _note(self, now: float, values: dict[str, float]) -> None:
        with self._lock:
            for name, value in values.items():
                self._tallies.setdefault(name, _Tally()).add(value)
            row: Row = {"t_s": now - self._began_s, "phase": self._current and self._current[0]}
        self._file.append(row | values)

    def summary(self) -> Telemetry:
        """Peaks, phases and series so far."""
        reasons: dict[str, str] = {}
        for sampler in self._samplers:
            reasons |= sampler.reasons
        gaps = {name: gap for s in self._samplers if (gap := s.gaps()) for name in s.columns}
        with self._lock:
            tallies, phases = dict(self._tallies), tuple(self._phases)
        series = tuple(
            tally.series(name, "; ".join(r for r in (reasons.get(name), gaps.get(name)) if r))
            for name, tally in tallies.items()
        )
        absent = {name: reason for name, reason in reasons.items() if name not in tallies}
        for name in OF_THE_TREE:
            if name not in tallies:
                absent.setdefault(name, self._no_process)
        if self._file.failure is not None:
            absent[PARQUET] = self._file.failure

        def peak(name: str) -> int | None:
            return int(tallies[name].maximum) if name in tallies else None

        used = [int(t.last) for name, t in tallies.items() if name.endswith("_used_bytes")]
        return Telemetry(
            rss_peak_bytes=peak("rss_bytes"),
            gpu_device_used_bytes=sum(used) if used else None,
            gpu_process_peak_bytes=peak("gpu_process_bytes"),
            sampled="in process" if self._in_process else "from outside",
            neighbours=self._gpus.neighbours,
            phases=phases,
            series=series,
            absent=absent,
        )


class _Tally:
    """Sums of one column; the samples themselves are on the disk."""

    def __init__(self) -> None:
        self.samples, self.total, self.last = 0, 0.0, math.nan
        self.minimum, self.maximum = math.inf, -math.inf

    def add(self, value: float) -> None:
        self.samples += 1
        self.total += value
        self.last = value
        self.minimum, self.maximum = min(self.minimum, value), max(self.maximum, value)

    def series(self, name: str, reason: str) -> Series:
        return Series(
            name=name,
            samples=self.samples,
            minimum=self.minimum,
            mean=self.total / self.samples,
            maximum=self.maximum,
            last=self.last,
            valid=not reason,
            reason=reason or None,
        )
