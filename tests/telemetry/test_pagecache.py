"""Residency against files whose state is known: just written, dropped, read in part."""

import os
import sys
from pathlib import Path

import pytest

from evalsuite.telemetry import pagecache
from evalsuite.telemetry.pagecache import (
    FileProbe,
    Unreadable,
    disk_bytes,
    files_under,
    resident_bytes,
    resident_share,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells residency")
MIB = 1 << 20


def written(path: Path, size: int) -> Path:
    """A file that is on the disk, so that its pages can be dropped."""
    with path.open("wb") as file:
        file.write(os.urandom(size))
        file.flush()
        os.fsync(file.fileno())
    return path


def drop(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def can_drop(folder: Path) -> bool:
    """A file system in memory keeps every page."""
    path = written(folder / "try", MIB)
    drop(path)
    return resident_bytes(path) == 0


@pytest.mark.parametrize("size", [1, 4096, 4097, 8 * MIB + 123])
def test_a_file_just_written_is_resident_to_the_last_byte(tmp_path: Path, size: int):
    path = written(tmp_path / "weights", size)
    assert resident_bytes(path) == size
    assert resident_share([path]) == 1


def test_a_file_that_was_dropped_is_not(tmp_path: Path):
    if not can_drop(tmp_path):
        pytest.skip("this file system keeps its pages")
    path = written(tmp_path / "weights", 8 * MIB)
    drop(path)
    assert resident_bytes(path) == 0
    assert resident_share([path]) == 0


def test_asking_changes_nothing(tmp_path: Path):
    if not can_drop(tmp_path):
        pytest.skip("this file system keeps its pages")
    path = written(tmp_path / "weights", 4 * MIB)
    drop(path)
    assert [resident_bytes(path) for _ in range(3)] == [0, 0, 0]


def test_what_is_read_comes_back_and_windows_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if not can_drop(tmp_path):
        pytest.skip("this file system keeps its pages")
    path = written(tmp_path / "weights", 8 * MIB)
    drop(path)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
        os.pread(file.fileno(), 2 * MIB, 3 * MIB)
    assert resident_bytes(path) == 2 * MIB
    monkeypatch.setattr(pagecache, "WINDOW_BYTES", MIB)
    assert resident_bytes(path) == 2 * MIB


def test_nothing_is_no_share(tmp_path: Path):
    assert resident_bytes(written(tmp_path / "empty", 0)) == 0
    assert resident_share([]) is None
    assert resident_share([tmp_path / "empty"]) is None


def test_a_file_of_others_is_refused_because_the_kernel_would_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = written(tmp_path / "weights", 4096)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(Unreadable, match="own a file"):
        resident_bytes(path)
    assert resident_share([path]) is None
    probe = FileProbe({"checkpoint": [path]})
    assert "page_cache_checkpoint_bytes" not in probe.read()
    assert "own a file" in probe.reasons["page_cache_checkpoint_bytes"]


def test_a_file_with_two_names_counts_once(tmp_path: Path):
    path = written(tmp_path / "blob", MIB)
    (tmp_path / "link").symlink_to(path)
    os.link(path, tmp_path / "hard")
    assert len(list(files_under([tmp_path]))) == 1
    assert disk_bytes([tmp_path, path]) == 512 * path.stat().st_blocks


def test_a_hole_takes_no_disk(tmp_path: Path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(64 * MIB)
    assert disk_bytes([tmp_path / "sparse"]) < MIB


def test_a_folder_that_comes_later(tmp_path: Path):
    probe = FileProbe({"experts": [tmp_path / "later"]})
    assert probe.read() == {"disk_experts_bytes": 0, "page_cache_experts_bytes": 0}
    (tmp_path / "later").mkdir()
    written(tmp_path / "later" / "layer0", MIB)
    found = probe.read()
    assert found["page_cache_experts_bytes"] == MIB
    assert found["disk_experts_bytes"] >= MIB
