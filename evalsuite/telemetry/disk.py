"""Disk space: what is free, and what the hub cache takes."""

from pathlib import Path

from evalsuite.telemetry.pagecache import disk_bytes
from evalsuite.telemetry.probes import free_disk_bytes


def hub_cache_bytes() -> int | None:
    """Disk space of the Hugging Face hub cache, all models together; None where there is none."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    return disk_bytes([folder]) if folder.is_dir() else None


class DiskProbe:
    """``free_disk_bytes`` of the file system that holds `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.reasons: dict[str, str] = {}

    def read(self) -> dict[str, float]:
        return {"free_disk_bytes": free_disk_bytes(self._path)}

    def close(self) -> None:
        pass
