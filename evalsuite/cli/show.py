"""Where output goes: results to standard output, everything that moves to standard error."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from evalsuite.core.units import duration, si_bytes
from evalsuite.report.tables import Table
from evalsuite.report.terminal import OnTerminal


class Screen:
    """The terminal. With ``--json``, tables go to standard error, and one document to standard output."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.error = Console(stderr=True, highlight=False)
        self.out = self.error if as_json else Console(highlight=False)

    def note(self, text: str) -> None:
        self.error.print(text, style="dim", markup=False)

    def warn(self, text: str) -> None:
        self.error.print(f"Note: {text}", style="yellow", markup=False)

    def table(self, table: Table[Any]) -> None:
        self.out.print(OnTerminal(table))
        self.out.print()

    def document(self, value: Any) -> None:
        if self.as_json:
            json.dump(value, sys.stdout, indent=1, allow_nan=False)
            sys.stdout.write("\n")

    @contextmanager
    def progress(self) -> Iterator["LiveProgress"]:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[perplexity]}"),
            TimeRemainingColumn(),
            console=self.error,
        ) as bar:
            yield LiveProgress(self, bar)

    @contextmanager
    def quantizing(self) -> Iterator["LiveQuantization"]:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[left]}"),
            console=self.error,
        ) as bar:
            yield LiveQuantization(self, bar)


class LiveProgress:
    """A bar on a terminal; a line a tenth where standard error is a file."""

    def __init__(self, screen: Screen, bar: Progress) -> None:
        self._screen, self._bar = screen, bar
        self._task: TaskID | None = None
        self._reported = -1
        self._workers: int | None = None
        self._began: tuple[float, int] | None = None

    def workers(self, count: int) -> None:
        self._workers = count

    def warn(self, text: str) -> None:
        self._screen.warn(text)

    def phase(self, text: str) -> None:
        if text != "scoring":
            self._screen.note(f"{text} …")

    def scored(self, done: int, total: int, perplexity: float) -> None:
        shown = (f"perplexity {perplexity:.4g}" if done else "") + self._pool(done, total)
        if not self._screen.error.is_terminal:
            tenth = 10 * done // total
            if tenth > self._reported:
                self._reported = tenth
                self._screen.note(f"{done:,} of {total:,} windows  {shown}")
            return
        if self._task is None:
            # the bar's clock starts at windows scored before, so that a resumed run predicts its own pace
            self._task = self._bar.add_task("windows", total=total, completed=done, perplexity=shown)
        self._bar.update(self._task, completed=done, perplexity=shown)

    def _pool(self, done: int, total: int) -> str:
        """Of a run on a cluster: workers, pace since scoring began, time left."""
        if self._workers is None:
            return ""
        began_s, before = self._began = self._began or (time.monotonic(), done)
        shown = f"  {self._workers:,} {'worker' if self._workers == 1 else 'workers'}"
        if done == before:
            return shown
        per_s = (done - before) / (time.monotonic() - began_s)
        left = "" if self._screen.error.is_terminal else f"  {duration((total - done) / per_s)} left"
        return f"{shown}  {per_s:.3g} windows/s{left}"


class LiveQuantization:
    """A bar on a terminal; a line a quarter where standard error is a file."""

    def __init__(self, screen: Screen, bar: Progress) -> None:
        self._screen, self._bar = screen, bar
        self._task: TaskID | None = None
        self._reported = 0

    def phase(self, text: str) -> None:
        self._screen.note(f"{text} …")

    def quantized(self, progress: Any) -> None:
        """Args: progress: an `evalsuite.quant.pipeline.Progress`."""
        rate = f"{progress.bytes_per_s / 1e9:.2f} GB/s"
        left = "" if progress.seconds_left is None else f"{duration(progress.seconds_left)} left"
        if not self._screen.error.is_terminal:
            quarter = 4 * progress.done // progress.total
            if quarter > self._reported:
                self._reported = quarter
                done, total = si_bytes(progress.done), si_bytes(progress.total)
                self._screen.note(f"{done} of {total}, {rate}, {left}")
            return
        if self._task is None:
            self._task = self._bar.add_task("quantizing", total=progress.total, rate=rate, left=left)
        self._bar.update(self._task, completed=progress.done, rate=rate, left=left)
