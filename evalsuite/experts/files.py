"""Expert files: one a checkpoint and record layout, written once and shared read-only.

`evalsuite.experts.header` says what is in one. It is written under the name ``….partial`` and renamed once it
is on the disk. The writer holds an exclusive advisory lock on it, so that a second start waits instead of
writing the same file; users hold a shared one, so that nothing in use is removed. The lock ends with its
process, whatever ends that.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from evalsuite.core.errors import StorageError
from evalsuite.core.units import si_bytes
from evalsuite.experts.header import HEADER_BYTES, SUFFIX, Header

PARTIAL = f"{SUFFIX}.partial"
NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{8}-v\d+\.experts(\.partial)?")
WRITE_BYTES = 1 << 26
POLL_S = 0.1
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cache_folder() -> Path:
    """``HLWQ_EVAL_CACHE``, or ``~/.cache/hlwq-eval/experts``."""
    given = os.environ.get("HLWQ_EVAL_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "hlwq-eval" / "experts"


@dataclass(frozen=True)
class OpenFile:
    """A verified file, open for reading under a shared lock until `descriptor` is closed.

    Attributes:
        written: this process wrote it; else it was there.
        notes: what a reader of the run should know, such as that a damaged file was replaced.
    """

    descriptor: int
    path: Path
    header: Header
    written: bool
    notes: tuple[str, ...] = ()


def open_or_write(header: Header, folder: Path, read_layer: Callable[[int], memoryview]) -> OpenFile:
    """Open the file of this checkpoint and layout, writing it first where it is missing or damaged.

    Args:
        read_layer: gives all records of a layer, called in the order of `header.layers`.

    Raises:
        StorageError: the disk has no room, refuses to be written, or gives back something else.
    """
    path = folder / header.name
    notes: list[str] = []
    written = False
    while True:
        with _storage_errors(path, header.file_bytes):
            descriptor = _open_existing(path)
        if descriptor is not None:
            try:
                with _storage_errors(path, header.file_bytes):
                    fcntl.flock(descriptor, fcntl.LOCK_SH)
                    found, problem = _verify(descriptor, header)
            except BaseException:
                os.close(descriptor)
                raise
            if found is not None:
                return OpenFile(descriptor, path, found, written, tuple(notes))
            os.close(descriptor)
            if written:
                raise StorageError(
                    f"{path} reads back differently from what was written.",
                    cause=f"{problem}; the disk or the memory is failing.",
                    todo="choose another disk with HLWQ_EVAL_CACHE, or --moe-expert-store pinned.",
                )
            notes.append(f"the expert file {path.name} was written anew, since {problem}")
        written = _write(path, header, read_layer)


def _open_existing(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None


def _verify(descriptor: int, wanted: Header) -> tuple[Header | None, str]:
    """The header as stored, or None and what is wrong with the file."""
    try:
        found = Header.decode(os.pread(descriptor, HEADER_BYTES, 0))
    except (ValueError, KeyError, TypeError) as error:
        return None, str(error)
    if replace(found, samples=(), checkpoint=wanted.checkpoint, source=wanted.source) != wanted:
        return None, f"it belongs to {found.checkpoint}"
    size = os.fstat(descriptor).st_size
    if size != wanted.file_bytes:
        return None, f"it has {size:,} bytes instead of {wanted.file_bytes:,}"
    for row, expected in enumerate(found.samples):
        if zlib.crc32(os.pread(descriptor, found.record_bytes, found.offset(row, 0))) != expected:
            return None, f"the experts of layer {found.layers[row]} are damaged"
    return found, ""


def _write(path: Path, header: Header, read_layer: Callable[[int], memoryview]) -> bool:
    """Write the file, unless another process does so meanwhile; returns whether this one did."""
    partial = path.with_name(path.name.removesuffix(SUFFIX) + PARTIAL)
    with _storage_errors(path, header.file_bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _lock_while_at(descriptor, partial):
            return False
        try:
            with _storage_errors(path, header.file_bytes):
                os.ftruncate(descriptor, 0)
                reserve(descriptor, path.parent, header.file_bytes)
                samples: list[int] = []
                for row, layer in enumerate(header.layers):
                    records = read_layer(layer)
                    samples.append(zlib.crc32(records[: header.record_bytes]))
                    _write_all(descriptor, records, header.offset(row, 0))
                _write_all(descriptor, memoryview(replace(header, samples=tuple(samples)).encode()), 0)
                os.fsync(descriptor)
                partial.rename(path)
                _sync_folder(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    finally:
        os.close(descriptor)
    return True


def reserve(descriptor: int, folder: Path, needed: int) -> None:
    """Find out that the disk is too small before hours of writing, not after.

    Raises:
        OSError: it has no room.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{si_bytes(free)} are free")
    try:
        os.posix_fallocate(descriptor, 0, needed)
    except OSError as error:  # some file systems cannot reserve
        if error.errno in NO_ROOM:
            raise


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while len(data):
        count = os.pwrite(descriptor, data[:WRITE_BYTES], offset)
        data, offset = data[count:], offset + count


def _lock_while_at(descriptor: int, path: Path) -> bool:
    """Lock the open file; False where `path` no longer names it, since its writer has finished or given up.

    A blocking lock would wait for the readers too, who lock the same file once it has its final name.
    """
    while True:
        locked = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            locked = False
        try:
            if not os.path.samestat(path.stat(), os.fstat(descriptor)):
                return False
        except FileNotFoundError:
            return False
        if locked:
            return True
        time.sleep(POLL_S)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _storage_errors(path: Path, needed: int) -> Generator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in NO_ROOM
        raise StorageError(
            f"The experts need {si_bytes(needed)} in {path.parent}, which cannot be used."
            if not full
            else f"The experts need {si_bytes(needed)} in {path.parent}, and the disk has no room for them.",
            cause=error.strerror or str(error),
            todo="make room (`hlwq-eval cache gc`), choose another folder with HLWQ_EVAL_CACHE, or keep the "
            "experts in memory with --moe-expert-store pinned.",
        ) from error


@dataclass(frozen=True)
class Entry:
    """A file in the cache folder; `header` is None where it cannot be read, and `problem` says why."""

    path: Path
    bytes: int
    header: Header | None
    problem: str = ""


def entries(folder: Path) -> Iterator[Entry]:
    """Every file that is named as `Header.name` names them, whole or half-written; others are not ours."""
    for path in sorted(folder.glob(f"*{SUFFIX}*")):
        if not NAME.fullmatch(path.name):
            continue
        if path.name.endswith(PARTIAL):
            yield Entry(path, _disk_bytes(path), None, "half-written")
            continue
        header, problem = None, ""
        try:
            with path.open("rb") as file:
                header = Header.decode(file.read(HEADER_BYTES))
            if path.stat().st_size != header.file_bytes:
                header, problem = None, "cut short"
        except (ValueError, KeyError, TypeError, OSError) as error:
            problem = str(error)
        yield Entry(path, _disk_bytes(path), header, problem)


def _disk_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


def remove(path: Path) -> bool:
    """Remove a file unless a process uses or writes it; returns whether it is gone.

    Raises:
        StorageError: it may not be removed.
    """
    descriptor = _open_existing(path)
    if descriptor is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except BlockingIOError:
        return False
    except OSError as error:
        raise StorageError(f"{path} could not be removed.", cause=str(error.strerror)) from error
    finally:
        os.close(descriptor)
    return True


def in_use(path: Path) -> bool:
    """Whether a process uses or writes the file."""
    descriptor = _open_existing(path)
    if descriptor is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def read_records(descriptor: int, offset: int, out: memoryview, path: Path) -> None:
    """Read bytes of a file into memory, all of them.

    Raises:
        StorageError: the file was cut short or the disk fails.
    """
    done = 0
    try:
        while done < len(out):
            count = os.preadv(descriptor, [out[done:]], offset + done)
            if count == 0:
                raise StorageError(
                    f"{path} has become shorter while it was in use.",
                    todo="find out what writes to the cache folder; the next start writes the file anew.",
                )
            done += count
    except OSError as error:
        raise StorageError(f"{path} cannot be read.", cause=str(error.strerror)) from error
