"""Readings of this process and of the disk, and what a probe is.

What cannot be read is absent with a reason, never zero.
"""

import resource
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol


class Probe(Protocol):
    """Something that can be read again and again."""

    @property
    def reasons(self) -> Mapping[str, str]:
        """Why a column could not be read, or was read and is not to be trusted."""
        ...

    def read(self) -> dict[str, float]:
        """Column to value, units in the names; only what could be read now."""
        ...

    def close(self) -> None: ...


def rss_peak_bytes() -> int:
    """Largest resident set of this process so far, in bytes (getrusage(2))."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def gpu_device_used_bytes(index: int) -> int:
    """Memory in use on a device by all processes, as NVML reports it, in bytes.

    Raises:
        pynvml.NVMLError: there is no driver, or no device of that index.
    """
    import pynvml

    pynvml.nvmlInit()
    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(index)).used)
    finally:
        pynvml.nvmlShutdown()


def free_disk_bytes(path: Path) -> int:
    """Free space of the file system that holds `path` or its nearest existing parent, in bytes."""
    return shutil.disk_usage(_existing(path)).free


def file_system(path: Path) -> int:
    """The number of the file system that holds `path` or its nearest existing parent."""
    return _existing(path).stat().st_dev


def _existing(path: Path) -> Path:
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path
