"""One clockwork: probes that are read together on a grid of times, and what it cost and missed.

A reading that takes c seconds is not repeated within c / `share`, so that a slow kernel or a large page cache
lowers the rate instead of taking the machine; c is the least of the last three, the first reading of all left
out, so that one that was interrupted slows nothing down. Grid times that pass without a sample are missing;
they are counted, and the longest time between two samples is kept.
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence

from evalsuite.telemetry.probes import Probe

# of the planned samples, and between two of them: what a series may miss and still be called valid
MISSING_SHARE = 0.01
LONGEST_GAP_S = 1.0


class Sampler:
    """Reads `probes` every `period_s`.

    Args:
        share: of one thread's time that readings may take.
        sink: is given the time and the values of each sample.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        probes: Sequence[Probe],
        period_s: float,
        share: float,
        sink: Callable[[float, dict[str, float]], None],
        clock: Callable[[], float],
    ) -> None:
        self._probes, self._period_s, self._share = probes, period_s, share
        self._sink, self._clock = sink, clock
        self._lock = threading.Lock()
        self._last_s: float | None = None
        self._costs_s: deque[float] = deque(maxlen=3)
        self.columns: set[str] = set()
        self.samples, self.missing = 0, 0
        self.longest_gap_s, self.spent_s = 0.0, 0.0

    def take(self) -> None:
        """One sample now; safe to call beside `run`."""
        with self._lock:
            began = self._clock()
            values: dict[str, float] = {}
            for probe in self._probes:
                values |= probe.read()
            cost_s = self._clock() - began
            if self._last_s is not None:
                self.longest_gap_s = max(self.longest_gap_s, began - self._last_s)
                self._costs_s.append(cost_s)
            self._last_s = began
            self.samples += 1
            self.spent_s += cost_s
            self.columns |= values.keys()
            self._sink(began, values)

    def run(self, wait: Callable[[float], bool]) -> None:
        """Sample until `wait` says so.

        Args:
            wait: waits so many seconds, or less where a sample is wanted sooner; True ends the run.
        """
        due = self._clock() + self._interval_s
        while not wait(max(0.0, due - self._clock())):
            now = self._clock()
            if now < due and now < self._allowed_s:
                continue
            self.take()
            late = max(0.0, now - due)
            passed = math.floor(late / self._interval_s)
            self.missing += passed
            due = (due if now >= due else now) + (passed + 1) * self._interval_s

    @property
    def _rest_s(self) -> float:
        return min(self._costs_s, default=0.0) / self._share

    @property
    def _interval_s(self) -> float:
        return max(self._period_s, self._rest_s)

    @property
    def _allowed_s(self) -> float:
        return -math.inf if self._last_s is None else self._last_s + self._rest_s

    def gaps(self) -> str | None:
        """What is missing, in words; None where nothing worth a word is."""
        planned = self.samples + self.missing
        if not planned:
            return None
        long = self.longest_gap_s > max(LONGEST_GAP_S, 3 * self._interval_s)
        if not long and self.missing <= MISSING_SHARE * planned:
            return None
        missing = f"{self.missing:,} of {planned:,} samples are missing, and " * bool(self.missing)
        return f"{missing}no sample was taken for {self.longest_gap_s:.2f} s, in which a peak can hide"

    def close(self) -> None:
        for probe in self._probes:
            probe.close()

    @property
    def reasons(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for probe in self._probes:
            found.update(probe.reasons)
        return found
