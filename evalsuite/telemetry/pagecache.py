"""How much of a file lies in the page cache: what a read of it would not have to fetch from the disk.

Read with mincore(2) on a mapping that is never touched, so that asking changes nothing. Unit: bytes, whole
pages, the last one cut at the end of the file. Since Linux 5.2 the kernel answers only for files that the
caller owns or may write; for others it calls every page resident, which is refused here.
"""

import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from evalsuite.core.errors import first_line

WINDOW_BYTES = 1 << 30  # mapped at a time: the answer takes a byte a page


Places = Sequence[Path] | Callable[[], Sequence[Path]]


class Unreadable(Exception):
    """Residency cannot be told here; the message says why."""


def resident_bytes(path: Path) -> int:
    """Bytes of a file that lie in the page cache.

    Raises:
        Unreadable: this system or this user cannot tell.
        OSError: the file cannot be opened.
    """
    if sys.platform != "linux":
        raise Unreadable("only Linux tells it")
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if status.st_uid != os.geteuid() and not os.access(path, os.W_OK):
            raise Unreadable("the kernel tells residency only to those who own a file or may write it")
        resident = 0
        for start in range(0, status.st_size, WINDOW_BYTES):
            resident += _resident_in(file.fileno(), start, min(WINDOW_BYTES, status.st_size - start))
        return resident


def resident_share(files: Sequence[Path]) -> float | None:
    """Share of the files' bytes in the page cache, 0 to 1; None where it cannot be told or there are none."""
    total = sum(path.stat().st_size for path in files)
    if not total:
        return None
    try:
        return sum(map(resident_bytes, files)) / total
    except (OSError, Unreadable):
        return None


def files_under(places: Sequence[Path]) -> Iterator[Path]:
    """The regular files among `places` and in the folders among them, each once; what is gone is left out."""
    seen: set[tuple[int, int]] = set()
    for place in places:
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if not path.is_file():
                continue
            status = path.stat()
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                yield path


def disk_bytes(places: Sequence[Path]) -> int:
    """Disk space that files and folders take, as allocated; a file with two names counts once."""
    return sum(512 * path.stat().st_blocks for path in files_under(places))


class FileProbe:
    """Page cache and disk taken by groups of files: ``page_cache_NAME_bytes`` and ``disk_NAME_bytes``.

    Args:
        groups: name to files and folders, or a function that gives them. A folder is searched anew at every
            reading, and need not exist yet.
    """

    def __init__(self, groups: Mapping[str, Places]) -> None:
        self._groups = groups
        self.reasons: dict[str, str] = {}

    def read(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for name, places in self._groups.items():
            files = list(files_under(places() if callable(places) else places))
            values[f"disk_{name}_bytes"] = disk_bytes(files)
            column = f"page_cache_{name}_bytes"
            if column in self.reasons:
                continue
            try:
                values[column] = sum(map(resident_bytes, files))
            except FileNotFoundError:
                continue  # removed since it was listed
            except Unreadable as error:
                self.reasons[column] = str(error)
            except OSError as error:
                self.reasons[column] = first_line(error)
        return values

    def close(self) -> None:
        pass


def _resident_in(descriptor: int, start: int, length: int) -> int:
    pages = -(-length // mmap.PAGESIZE)
    answer = np.empty(pages, np.uint8)
    with mmap.mmap(descriptor, length, access=mmap.ACCESS_READ, offset=start) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        failed = _libc().mincore(
            ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(length), ctypes.c_void_p(answer.ctypes.data)
        )
        del view  # or the mapping could not be closed
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    here = (answer & 1).astype(np.bool_)
    tail = length - (pages - 1) * mmap.PAGESIZE
    return int(here[:-1].sum()) * mmap.PAGESIZE + (tail if here[-1] else 0)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
