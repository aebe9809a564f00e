"""A process and its descendants, read from outside.

Quantities, each summed over the tree:

- ``rss_bytes``: resident pages; a page that two processes share counts twice.
- ``pss_bytes``: resident pages, each divided by the number of processes that map it: what the tree takes.
- ``uss_bytes``: resident pages that no other process maps; ``shared_bytes`` is RSS − USS.
- ``disk_read_bytes``, ``disk_written_bytes``: that the tree made the kernel read from and write to block
  devices, through system calls or mapped memory. A file system without a block device counts nothing here.
- ``major_faults``: page faults that waited for a disk.

The last three count from the birth of each process. The kernel adds the traffic of a process that has ended
to that of the parent that waited for it (``/proc/PID/io`` in proc(5)), and it is counted there from then on.
Of an orphan, and of faults, what came between the last reading and its end is not seen. Where a parent that
lives on has not waited, or ended at the same moment, as much of what comes later is missing as the child had.
"""

import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

REFRESH_S = 1.0  # children are searched among all processes of the machine, which takes milliseconds
TRAFFIC = ("disk_read_bytes", "disk_written_bytes")
COUNTERS = (*TRAFFIC, "major_faults")
ENDED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
NO_PROC = "only Linux tells it"


class ProcessTree:
    """A process and its descendants: a child that outlives its parent stays a member.

    Args:
        pid: of the root; or a function that gives it, None while there is none.
    """

    def __init__(self, pid: int | Callable[[], int | None]) -> None:
        self._pid: Callable[[], int | None] = pid if callable(pid) else lambda: pid
        self._members: dict[int, psutil.Process] = {}
        self._ever: set[int] = set()
        self._refreshed = -REFRESH_S
        self._lock = threading.Lock()

    def alive(self, *, refresh: bool = False) -> list[psutil.Process]:
        """Members that run, searched anew at most once a second unless told to."""
        with self._lock:
            if refresh or not self._members or time.monotonic() - self._refreshed >= REFRESH_S:
                self._refresh()
            return list(self._members.values())

    def pids(self, *, refresh: bool = False) -> frozenset[int]:
        """Of all members so far, whether or not they still run."""
        self.alive(refresh=refresh)
        return frozenset(self._ever)

    def _refresh(self) -> None:
        roots = list(self._members.values())
        root = self._pid()
        if root is not None and root not in self._ever:  # a number may come back with another process
            with suppress(psutil.NoSuchProcess):
                roots.insert(0, psutil.Process(root))
        found: dict[int, psutil.Process] = {}
        for process in roots:
            if process.pid in found:
                continue  # with all its descendants
            found[process.pid] = process
            with suppress(psutil.NoSuchProcess):
                for child in process.children(recursive=True):
                    found.setdefault(child.pid, child)
        self._members = {pid: process for pid, process in found.items() if runs(process)}
        self._ever |= self._members.keys()
        self._refreshed = time.monotonic()


def files_held(tree: ProcessTree, folder: Path) -> list[Path]:
    """Files in `folder` that a process of the tree has open, by name.

    What maps a file and has closed it is not seen, nor is a process of another user.
    """
    held: set[Path] = set()
    for process in tree.alive():
        with suppress(psutil.Error):
            held |= {Path(file.path) for file in process.open_files()}
    inside = folder.resolve()
    return sorted(path for path in held if path.parent == inside)


def runs(process: psutil.Process) -> bool:
    """Whether it has not ended; an orphan may stay a zombie for good, where no init reaps it."""
    try:
        return process.is_running() and process.status() not in ENDED
    except psutil.NoSuchProcess:
        return False


class ProcessProbe:
    """Resident memory, disk traffic and major faults of a tree; nothing once it has ended."""

    def __init__(self, tree: ProcessTree) -> None:
        self._tree = tree
        self._counted: dict[psutil.Process, dict[str, int]] = {}  # that run, and zombies
        self._parent: dict[int, int] = {}
        self._ended = dict.fromkeys(COUNTERS, 0)  # of those that are counted in no other
        self._most = dict.fromkeys(COUNTERS, 0)
        self.reasons: dict[str, str] = {}
        if sys.platform != "linux":
            self.reasons = dict.fromkeys(COUNTERS, NO_PROC)

    def read(self) -> dict[str, float]:
        rss, running = 0, 0
        for process in self._tree.alive():
            try:
                with process.oneshot():
                    if process.status() in ENDED:
                        continue
                    rss += process.memory_info().rss
                    running += 1
                if sys.platform == "linux":
                    self._count(process)
            except psutil.NoSuchProcess:
                continue
            except psutil.AccessDenied as error:
                self.reasons["rss_bytes"] = f"process {error.pid} may not be read"
        if not running:
            return {}
        values: dict[str, float] = {"rss_bytes": rss, "processes": running}
        self._settle()
        for name in COUNTERS:
            if name not in self.reasons:
                found = self._ended[name] + sum(counts[name] for counts in self._counted.values())
                values[name] = self._most[name] = max(self._most[name], found)
        return values

    def _count(self, process: psutil.Process) -> None:
        try:
            traffic = process.io_counters()
            faults = _major_faults(process.pid)
            parent = process.ppid()
        except (psutil.AccessDenied, PermissionError):
            if not runs(process):
                return  # it ended between two lines
            self.reasons |= dict.fromkeys(COUNTERS, f"process {process.pid} may not be read")
            return
        except (FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess):
            return
        self._counted[process] = dict(
            zip(COUNTERS, (traffic.read_bytes, traffic.write_bytes, faults), strict=True)
        )
        self._parent[process.pid] = parent

    def _settle(self) -> None:
        """Take out those that are no more, and keep what is counted in none of those that are left."""
        gone = [process for process in self._counted if not process.is_running()]  # zombies are
        last = {process.pid: self._counted.pop(process) for process in gone}
        left = {process.pid for process in self._counted}
        for pid, counts in last.items():
            elsewhere = TRAFFIC if self._descends(pid, left) else ()
            for name in COUNTERS:
                if name not in elsewhere:
                    self._ended[name] += counts[name]

    def _descends(self, pid: int, from_any: set[int]) -> bool:
        for _ in self._parent:  # no more steps than that, should a number have come back
            if (above := self._parent.get(pid)) is None:
                return False
            if above in from_any:
                return True
            pid = above
        return False

    def close(self) -> None:
        pass


class SharedMemoryProbe:
    """PSS, USS and what is shared: the kernel walks every page that is mapped, so it is read seldom."""

    def __init__(self, tree: ProcessTree) -> None:
        self._tree = tree
        self.reasons: dict[str, str] = {}
        if sys.platform != "linux":
            self.reasons = dict.fromkeys(("pss_bytes", "uss_bytes", "shared_bytes"), NO_PROC)

    def read(self) -> dict[str, float]:
        if self.reasons:
            return {}
        pss, uss, rss = 0, 0, 0
        for process in self._tree.alive():
            try:
                memory = process.memory_full_info()
            except psutil.NoSuchProcess:  # zombies too
                continue
            except psutil.AccessDenied as error:
                reason = f"process {error.pid} may not be read"
                self.reasons = dict.fromkeys(("pss_bytes", "uss_bytes", "shared_bytes"), reason)
                return {}
            pss, uss, rss = pss + memory.pss, uss + memory.uss, rss + memory.rss
        if not rss:
            return {}
        return {"pss_bytes": pss, "uss_bytes": uss, "shared_bytes": rss - uss}

    def close(self) -> None:
        pass


def _major_faults(pid: int) -> int:
    """Field 12 of /proc/PID/stat; the second field is a name that may hold spaces and brackets."""
    text = Path(f"/proc/{pid}/stat").read_text()
    return int(text[text.rindex(")") + 2 :].split()[9])
