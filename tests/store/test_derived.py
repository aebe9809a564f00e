"""Derived files are replaced whole or not at all."""

import errno
from pathlib import Path

import pytest

from evalsuite.core.errors import StorageError
from evalsuite.store.derived import write_derived


def test_it_replaces_what_was_there(tmp_path):
    path = tmp_path / "table.md"
    assert write_derived(path, "é\n") == path
    write_derived(path, "new\n")
    assert path.read_text(encoding="utf-8") == "new\n"
    assert [p.name for p in tmp_path.iterdir()] == ["table.md"]


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_derived(tmp_path / "table.md", "old\n")

    def full(self, *arguments, **options):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StorageError, match=r"(?s)disk is full.*run the same command again"):
        write_derived(path, "new\n")
    assert path.read_bytes() == b"old\n"
    assert [p.name for p in tmp_path.iterdir()] == ["table.md"]


def test_a_missing_folder_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_derived(tmp_path / "no" / "table.md", "")
