"""A run while it is being written: whole batches, on the disk before they count.

Its layout is described in store/runs.py.
"""

import errno
import fcntl
import io
import json
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from evalsuite.core.errors import EvalError, StorageError
from evalsuite.core.record import Record
from evalsuite.core.spec import canonical_json
from evalsuite.store.rows import Rows

PARTIAL = ".partial"


RESUMABLE = (
    "make room or choose another --results folder; finished windows are kept, "
    "and the same command resumes there."
)


@contextmanager
def storage_errors(path: Path, todo: str = RESUMABLE) -> Generator[None]:
    """Turn a full or read-only disk into an error that says what to do about it.

    Raises:
        StorageError: the operating system refused to write.
    """
    try:
        yield
    except OSError as error:
        known = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the disk quota is used up",
            errno.EROFS: "the file system is read-only",
            errno.EACCES: "permission denied",
            errno.EPERM: "permission denied",
            errno.EIO: "the device reports an error",
            errno.EFBIG: "the file would be larger than is allowed here",
            errno.ENOTDIR: "a part of that path is a file",
            errno.EEXIST: "a part of that path is a file",
        }
        if error.errno not in known:
            raise
        raise StorageError(
            f"Nothing more can be written to {path}.",
            cause=known[error.errno],
            todo=todo,
        ) from error


class RunFolder:
    """An unfinished run that this process owns (an advisory lock says so)."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.identity = identity
        with storage_errors(path):
            self._lock = (path / "lock").open("w")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.rows = self._read_rows()
            except BaseException:
                self._lock.close()
                raise
        self._lines: IO[str] | None = None
        self._hidden: IO[bytes] | None = None

    @property
    def run_id(self) -> str:
        return f"{self.path.parent.name}/{self.path.name.removesuffix(PARTIAL)}"

    @property
    def started(self) -> str:
        return self.identity["started"]

    def _read_rows(self) -> Rows:
        """Whole batches only: a torn last line, or a batch cut short, is scored again."""
        path, kept_rows = self.path / "windows.jsonl", Rows()
        if not path.exists():
            return kept_rows
        rows: list[dict[str, Any]] = []
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1]):
            try:
                row = json.loads(line)
                found, _ = int(row["window"]), bool(row["ends_batch"])
            except (ValueError, TypeError, KeyError) as error:
                raise StorageError(
                    f"Line {number + 1} of {path} is damaged.",
                    cause="the file was changed, or the disk lost a block.",
                    todo="start again with --fresh.",
                ) from error
            if found != number:
                raise StorageError(
                    f"{path} skips from window {number - 1} to {found}.",
                    todo="start again with --fresh.",
                )
            rows.append(row)
        while rows and not rows[-1]["ends_batch"]:
            rows.pop()
        kept = sum(len(line) + 1 for line in lines[: len(rows)])
        os.truncate(path, kept)
        for row in rows:
            del row["ends_batch"]
        kept_rows.extend(rows)
        return kept_rows

    def append(self, rows: Sequence[dict[str, Any]], hidden: Sequence[NDArray[np.uint16]] = ()) -> None:
        """Add one batch of windows; on return it is on the disk.

        Raises:
            StorageError: the disk is full.
        """
        with storage_errors(self.path):
            if hidden:
                self._append_hidden(hidden)
            if self._lines is None:
                self._lines = (self.path / "windows.jsonl").open("a")
            last = len(rows) - 1
            lines = [canonical_json(row | {"ends_batch": i == last}) + "\n" for i, row in enumerate(rows)]
            self._lines.write("".join(lines))
            self._lines.flush()
            os.fsync(self._lines.fileno())
        self.rows.extend(rows)

    def _append_hidden(self, hidden: Sequence[NDArray[np.uint16]]) -> None:
        if self._hidden is None:
            self._hidden = self._open_hidden(hidden[0].shape[1])
        for block in hidden:
            self._hidden.write(np.ascontiguousarray(block).tobytes())
        self._hidden.flush()
        os.fsync(self._hidden.fileno())  # before the lines, which promise that the states are there

    def _open_hidden(self, width: int) -> IO[bytes]:
        """The .npy header names the final shape at once; the rows follow as they are scored."""
        path = self.path / "hidden.npy"
        header = {"descr": "<u2", "fortran_order": False, "shape": (self.identity["scored_tokens"], width)}
        npy: Any = np.lib.format
        start = io.BytesIO()
        npy.write_array_header_1_0(start, header)
        kept = len(start.getvalue()) + int(sum(self.rows.column("scored"))) * width * 2
        if self.rows and (not path.is_file() or path.stat().st_size < kept):
            raise StorageError(
                f"{path} is missing or shorter than the {len(self.rows)} windows that are scored.",
                cause="it was removed or cut, or the machine lost power.",
                todo="start again with --fresh.",
            )
        file = path.open("r+b" if self.rows else "w+b")
        file.write(start.getvalue())
        file.seek(kept)
        file.truncate()
        return file

    def finish(self, record: Record) -> Path:
        """Write the record and give the folder its final name.

        Raises:
            StorageError: the disk is full; the unfinished folder is kept whole.
        """
        with storage_errors(self.path):
            if self.rows:
                # rows read back have their keys in the order of the file: one order, whoever wrote them
                frame = self.rows.frame()
                frame[sorted(frame.columns)].to_parquet(self.path / "windows.parquet", index=False)
                _sync(self.path / "windows.parquet")
            self.write_record(record)
            final = self.path.with_name(self.path.name.removesuffix(PARTIAL))
            # the new name first, under the lock: whatever ends the process before it leaves a folder to
            # resume, and after it a finished run with a scrap too many
            self.path.rename(final)
            for scrap in ("windows.jsonl", "identity.json", "lock"):
                (final / scrap).unlink(missing_ok=True)
            self.close()
        return final

    def leave_unfinished(self, record: Record, error: BaseException) -> None:
        """Say why in the folder, unless the disk is what failed; its samples are on the disk already."""
        if not isinstance(error, StorageError):
            reason = error.what if isinstance(error, EvalError) else f"{type(error).__name__}: {error}"
            with suppress(OSError):  # what is reported is why the run ended
                self.write_record(record.model_copy(update={"error": reason, "files": ()}))
        self.close()

    def write_record(self, record: Record) -> None:
        text = json.dumps(record.model_dump(mode="json"), indent=1, allow_nan=False)
        temporary = self.path / "run.json.tmp"
        temporary.write_text(text + "\n")
        _sync(temporary)
        temporary.rename(self.path / "run.json")

    def close(self) -> None:
        """Let go of the files. What could not be written was reported when it failed, and is not again."""
        for file in (self._lines, self._hidden, self._lock):
            if file is not None:
                with suppress(OSError):
                    file.close()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
