"""Samples on disk: one wide table, ``telemetry.parquet``, and the lines it comes from while it grows.

Columns: ``t_s`` (seconds since sampling began), ``phase``, and one for each quantity, its unit in its name.
A row holds what was read at that moment; quantities that are read less often are null in between. While
sampling, rows are appended to ``telemetry.jsonl``, so that whatever ends the process costs at most the last
second.
"""

import json
import threading
from pathlib import Path
from typing import Any

import pandas as pd

from evalsuite.core.errors import StorageError, first_line

PARQUET, LINES = "telemetry.parquet", "telemetry.jsonl"
FLUSH_S = 1.0

Row = dict[str, Any]


class SampleFile:
    """Rows on their way to the disk. A full disk is no reason to end a run: `failure` tells of it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._flushed_s = 0.0
        self.failure: str | None = None
        self._lines = (folder / LINES).open("w")

    def append(self, row: Row) -> None:
        with self._lock:
            if self.failure is not None:
                return
            try:
                self._lines.write(json.dumps(row, allow_nan=False) + "\n")
                if row["t_s"] - self._flushed_s >= FLUSH_S:
                    self._lines.flush()
                    self._flushed_s = row["t_s"]
            except OSError as error:
                self.failure = first_line(error)

    def finish(self) -> None:
        """Turn the lines into the table; they stay where that fails."""
        try:
            self._lines.close()
            samples = _read_lines(self._folder / LINES)
            samples.to_parquet(self._folder / PARQUET, index=False)
        except OSError as error:
            self.failure = self.failure or first_line(error)
            return
        (self._folder / LINES).unlink()


def load_samples(folder: Path) -> pd.DataFrame:
    """The samples of a run in order of time, finished or broken off.

    Raises:
        StorageError: there are none, or they are damaged.
    """
    try:
        if (folder / PARQUET).is_file():
            return pd.read_parquet(folder / PARQUET)
        return _read_lines(folder / LINES)
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid and JSON's error are ValueErrors
        raise StorageError(
            f"The samples in {folder} cannot be read.",
            cause=first_line(error),
            todo="restore the file from a copy, or run it again.",
        ) from error


def _read_lines(path: Path) -> pd.DataFrame:
    """Whole lines: the last may be torn. Two threads write, each in order of its own time."""
    lines = path.read_bytes().split(b"\n")[:-1]
    frame = pd.DataFrame([json.loads(line) for line in lines], columns=None if lines else ["t_s", "phase"])
    numbers = [name for name in frame.columns if name != "phase"]
    return frame.astype(dict.fromkeys(numbers, "float64")).sort_values(
        "t_s", kind="stable", ignore_index=True
    )
