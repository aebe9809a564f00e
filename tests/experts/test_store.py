"""Stores give back what was put in, and never a file's bytes that are not the checkpoint's."""

import errno
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evalsuite.core.errors import OutOfMemory, StorageError
from evalsuite.experts import files
from evalsuite.experts.files import entries, in_use, remove
from evalsuite.experts.header import HEADER_BYTES, Header
from evalsuite.experts.layout import ALIGNMENT, Field, RecordLayout
from experts.stores import IDENTITY, LAYOUT, MadeUp, disk, filled, pinned

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def source():
    return MadeUp()


@pytest.mark.parametrize("make", [pinned, disk])
def test_every_expert_comes_back(make, source, tmp_path):
    store = make(source, tmp_path)
    for layer in source.layers:
        order = [3, 0, 6, 2, 1, 5, 4]
        assert torch.equal(filled(store, layer, order), source.records[layer][order])
    assert (store.layers, store.experts, store.layout) == (source.layers, 7, LAYOUT)
    store.close()


def test_more_copies_than_staging_buffers(tmp_path):
    source = MadeUp(experts=200)
    store = disk(source, tmp_path)
    order = list(range(199, -1, -1))
    for _ in range(3):
        assert torch.equal(filled(store, 3, order), source.records[3][order])
    store.close()


def test_an_expert_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("evalsuite.experts.store.SMALLEST_PIECE", 100)
    source = MadeUp()
    store = disk(source, tmp_path)
    store._staging._threads = 4
    assert torch.equal(filled(store, 1, [2]), source.records[1][[2]])
    store.close()


DTYPES = st.sampled_from(["int32", "bfloat16", "float32", "uint8"])
FIELDS = st.lists(
    st.tuples(DTYPES, st.lists(st.integers(1, 9), min_size=1, max_size=3)), min_size=1, max_size=4
)


@settings(max_examples=50, deadline=None)
@given(FIELDS, st.integers(1, 5))
def test_fields_share_a_record_without_overlap(fields, slots):
    layout = RecordLayout(
        tuple(Field(str(i), dtype, tuple(shape)) for i, (dtype, shape) in enumerate(fields))
    )
    records = torch.zeros(slots, layout.record_bytes, dtype=torch.uint8)
    views = layout.views(records)
    torch.manual_seed(0)
    values = {}
    for field in layout.fields:
        values[field.name] = torch.randint(0, 100, (slots, *field.shape)).to(getattr(torch, field.dtype))
        views[field.name].copy_(values[field.name])
    for name, value in values.items():
        assert torch.equal(views[name], value)
        assert all(views[name][i].is_contiguous() for i in range(slots))
    assert all(offset % ALIGNMENT == 0 for offset in layout.offsets)


def test_the_next_start_reads_nothing_of_the_checkpoint(source, tmp_path):
    disk(source, tmp_path).close()
    assert source.reads == 3
    again = disk(source, tmp_path)
    assert source.reads == 3
    assert not again.written
    assert not again.notes
    assert torch.equal(filled(again, 4, [6]), source.records[4][[6]])
    again.close()


def spoil_cut(path):
    os.truncate(path, path.stat().st_size - 1)


def spoil_header_only(path):
    os.truncate(path, HEADER_BYTES)


def spoil_longer(path):
    os.truncate(path, path.stat().st_size + 1)


def spoil_empty(path):
    os.truncate(path, 0)


def spoil_foreign(path):
    path.write_bytes(b"\x89PNG" * 100_000)


def spoil_header(path):
    damaged = bytearray(path.read_bytes())
    damaged[60] ^= 1
    path.write_bytes(damaged)


def spoil_records(path):
    """As a hole that a crash left."""
    with path.open("r+b") as file:
        file.seek(HEADER_BYTES + 7 * LAYOUT.record_bytes)
        file.write(bytes(LAYOUT.record_bytes))


def spoil_version(path):
    header = Header.decode(path.read_bytes()[:HEADER_BYTES])
    with path.open("r+b") as file:
        file.write(replace(header, version=99).encode())


def spoil_other_model(path):
    header = Header.decode(path.read_bytes()[:HEADER_BYTES])
    with path.open("r+b") as file:
        file.write(replace(header, fingerprint="e" * 64, checkpoint="another").encode())


SPOILED = [
    (spoil_cut, "bytes instead of"),
    (spoil_header_only, "bytes instead of"),
    (spoil_longer, "bytes instead of"),
    (spoil_empty, "not an expert file"),
    (spoil_foreign, "not an expert file"),
    (spoil_header, "header is damaged"),
    (spoil_records, "experts of layer 3 are damaged"),
    (spoil_version, "version 99"),
    (spoil_other_model, "belongs to another"),
]


@pytest.mark.parametrize(("spoil", "reason"), SPOILED)
def test_a_file_that_is_not_these_experts_is_written_anew(source, tmp_path, spoil, reason):
    store = disk(source, tmp_path)
    store.close()
    spoil(store.path)
    again = disk(source, tmp_path)
    assert source.reads == 6
    assert again.written
    assert reason in again.notes[0]
    for layer in source.layers:
        assert torch.equal(filled(again, layer, range(7)), source.records[layer])
    again.close()


def test_other_weights_and_other_layouts_have_other_files(source, tmp_path):
    first = disk(source, tmp_path)
    second = disk(MadeUp(seed=1), tmp_path, replace(IDENTITY, fingerprint="a" * 64))
    third = disk(MadeUp(experts=5), tmp_path)
    assert len({first.path, second.path, third.path}) == 3
    assert torch.equal(filled(first, 1, [0]), source.records[1][[0]])
    assert len(list(entries(tmp_path))) == 3
    for store in (first, second, third):
        store.close()


def test_a_moved_checkpoint_uses_the_same_file(source, tmp_path):
    disk(source, tmp_path).close()
    moved = disk(source, tmp_path, replace(IDENTITY, checkpoint="renamed", source="/elsewhere"))
    assert source.reads == 3
    assert not moved.written
    moved.close()


def test_what_an_interrupted_start_left_is_not_used(source, tmp_path):
    class Stopped(MadeUp):
        def read_layer(self, layer, out):
            if layer == 3:
                raise KeyboardInterrupt
            super().read_layer(layer, out)

    with pytest.raises(KeyboardInterrupt):
        disk(Stopped(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_start_left_is_overwritten(source, tmp_path):
    store = disk(source, tmp_path)
    store.close()
    whole = store.path.read_bytes()
    store.path.unlink()
    half = store.path.with_name(store.path.name.replace(".experts", ".experts.partial"))
    half.write_bytes(whole[: len(whole) // 2] + bytes(len(whole)))
    again = disk(source, tmp_path)
    assert again.written
    assert again.path.read_bytes() == whole
    assert not half.exists()
    again.close()


def test_two_starts_write_one_file(tmp_path):
    """The second waits for the first, and then reads what it wrote."""
    reading, go_on = threading.Event(), threading.Event()

    class Slow(MadeUp):
        def read_layer(self, layer, out):
            reading.set()
            assert go_on.wait(30)
            super().read_layer(layer, out)

    slow, second = Slow(), MadeUp()
    stores = []
    threads = [threading.Thread(target=lambda s=s: stores.append(disk(s, tmp_path))) for s in (slow, second)]
    threads[0].start()
    assert reading.wait(30)
    threads[1].start()
    threads[1].join(0.3)
    assert threads[1].is_alive(), "it must not touch the file that is being written"
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert (slow.reads, second.reads) == (3, 0)
    assert sorted(store.written for store in stores) == [False, True]
    assert len(list(tmp_path.iterdir())) == 1
    for store in stores:
        store.close()


USER = """
import sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from experts.stores import MadeUp, disk, filled
source = MadeUp()
store = disk(source, Path(sys.argv[1]))
assert source.reads == 0
assert (filled(store, 4, [5, 1]) == source.records[4][[5, 1]]).all()
print("using", flush=True)
sys.stdin.read()
"""


def test_two_processes_share_a_file_and_neither_loses_it(source, tmp_path):
    mine = disk(source, tmp_path)
    other = subprocess.Popen(
        [sys.executable, "-c", USER, str(tmp_path), str(ROOT), str(ROOT / "tests")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert other.stdout.readline().strip() == "using"
    assert torch.equal(filled(mine, 4, [5]), source.records[4][[5]])
    mine.close()
    assert in_use(mine.path)
    assert not remove(mine.path), "the other process still reads it"
    other.kill()
    other.wait()
    other.stdin.close()
    other.stdout.close()
    assert not in_use(mine.path), "a lock does not outlive its process"
    assert remove(mine.path)
    assert not mine.path.exists()


def test_a_full_disk_is_refused_with_numbers_before_anything_is_read(source, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10_000})
    monkeypatch.setattr("evalsuite.experts.files.shutil.disk_usage", lambda path: usage)
    with pytest.raises(StorageError) as caught:
        disk(source, tmp_path)
    assert "76.3 kB" in caught.value.what
    assert "10 kB are free" in caught.value.cause
    assert "cache gc" in caught.value.todo
    assert source.reads == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_fails_while_writing_leaves_nothing(source, tmp_path, monkeypatch, code):
    def refuse(descriptor, data, offset):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("evalsuite.experts.files.os.pwrite", refuse)
    with pytest.raises(StorageError, match=r"need 76\.3 kB"):
        disk(source, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(source, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(StorageError, match="cannot be used"):
        disk(source, tmp_path / "taken" / "experts")


def test_a_disk_that_cannot_lock_is_refused(source, tmp_path, monkeypatch):
    disk(source, tmp_path).close()

    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("evalsuite.experts.files.fcntl.flock", refuse)
    with pytest.raises(StorageError, match="cannot be used") as caught:
        disk(source, tmp_path)
    assert "locks" in caught.value.cause


def test_a_file_that_is_cut_under_a_running_engine_is_an_error(source, tmp_path):
    store = disk(source, tmp_path)
    os.truncate(store.path, HEADER_BYTES + 10)
    with pytest.raises(StorageError, match="shorter while it was in use"):
        filled(store, 4, [0, 1, 2])
    store.close()


def test_a_store_that_does_not_fit_in_memory(source, monkeypatch):
    monkeypatch.setattr("evalsuite.experts.store.free_ram_bytes", lambda: 1000)
    with pytest.raises(OutOfMemory, match="1 kB are free"):
        pinned(source, None)
    assert source.reads == 0


def test_the_folder_is_the_users_choice(monkeypatch, tmp_path):
    monkeypatch.setenv("HLWQ_EVAL_CACHE", str(tmp_path / "here"))
    assert files.cache_folder() == tmp_path / "here"
    monkeypatch.delenv("HLWQ_EVAL_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / ".cache" / "hlwq-eval" / "experts"


def test_entries_of_the_folder(source, tmp_path):
    store = disk(source, tmp_path)
    store.close()
    cut, half, foreign = (f"{letter * 16}-{letter * 8}-v1.experts" for letter in "abc")
    (tmp_path / cut).write_bytes(store.path.read_bytes()[:-5])
    (tmp_path / f"{half}.partial").write_bytes(b"x")
    (tmp_path / foreign).write_bytes(b"x" * 100)
    (tmp_path / "letter.txt").write_text("not ours")
    (tmp_path / "somebody.experts").write_text("not ours")
    found = {entry.path.name: (entry.header is not None, entry.problem) for entry in entries(tmp_path)}
    assert found == {
        store.path.name: (True, ""),
        cut: (False, "cut short"),
        f"{half}.partial": (False, "half-written"),
        foreign: (False, "it is not an expert file"),
    }
