"""Host memory that can still be taken: what the machine has free, or the container's limit leaves.

Linux's control groups, version 2 (https://docs.kernel.org/admin-guide/cgroup-v2.html#memory) and 1; a group's
limit holds for all groups below it. Pages of files count as free, as the kernel drops them first.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

# version: (its folder below the root, limit, use, and the beginning of the keys of files in memory.stat)
VERSIONS = {
    2: ("", "memory.max", "memory.current", ""),
    1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}


def free_ram_bytes(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process can take before the machine, or a control group it is in, has none left."""
    return min([psutil.virtual_memory().available, *_left(groups, root)])


def _left(groups: Path, root: Path) -> Iterator[int]:
    lines: list[str] = []
    with suppress(OSError):
        lines = groups.read_text().splitlines()
    for line in lines:
        number, controllers, path = line.split(":", 2)
        version = 2 if number == "0" else 1
        if version == 1 and "memory" not in controllers.split(","):
            continue
        below, limit, used, total = VERSIONS[version]
        top = root / below
        here = top / path.lstrip("/")
        for folder in (here, *here.parents):
            if not folder.is_relative_to(top):
                break
            with suppress(OSError, ValueError, KeyError):  # no limit: "max", or no such file at the root
                stat = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
                allowed = int((folder / limit).read_text())
                files = sum(int(stat[f"{total}{list_}_file"]) for list_ in ("active", "inactive"))
                yield allowed - int((folder / used).read_text()) + files
