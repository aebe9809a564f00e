"""An expert file of an engine that fails or ends, without vLLM."""

import gc
import os

import pytest
import torch
from torch.nn import Parameter

from evalsuite.core.errors import StorageError
from evalsuite.engines.vllm_plugin import spill
from evalsuite.engines.vllm_plugin.disk_store import ExpertFile
from evalsuite.experts.files import in_use
from evalsuite.experts.header import Header
from evalsuite.experts.layout import Field, RecordLayout

LAYOUT = RecordLayout((Field("w", "float32", (8,)),))
HEADER = Header(
    "0" * 64,
    "made up",
    "/nowhere",
    (0, 1),
    4,
    LAYOUT.record_bytes,
    tuple((f.name, f.dtype, f.shape) for f in LAYOUT.fields),
)


def records():
    return torch.ones(4, LAYOUT.record_bytes, dtype=torch.uint8)


def load(folder):
    file = ExpertFile(HEADER, LAYOUT, torch.device("cpu"), folder)
    for layer in HEADER.layers:
        file.offer(layer, records)
    file.finish()
    return file


def test_a_load_that_fails_leaves_nothing_and_the_next_one_goes_on(tmp_path):
    file = ExpertFile(HEADER, LAYOUT, torch.device("cpu"), tmp_path)
    file.offer(0, records)
    file.abandon(RuntimeError("out of memory"))
    assert list(tmp_path.iterdir()) == []
    assert load(tmp_path).written


def test_abandoning_a_file_that_was_there_changes_nothing(tmp_path):
    load(tmp_path)
    file = ExpertFile(HEADER, LAYOUT, torch.device("cpu"), tmp_path)
    file.abandon(RuntimeError("out of memory"))
    assert [path.name for path in tmp_path.iterdir()] == [HEADER.name]


def test_a_file_is_in_use_as_long_as_its_engine_is(tmp_path):
    file = load(tmp_path)
    assert in_use(tmp_path / HEADER.name)
    del file
    gc.collect()
    assert not in_use(tmp_path / HEADER.name)


def test_parameters_in_files_hold_what_is_written_to_them(tmp_path, monkeypatch):
    monkeypatch.setattr(spill, "SMALLEST_BYTES", 64)
    large, small = Parameter(torch.zeros(8, 16)), Parameter(torch.zeros(2))
    large.weight_loader = "kept"
    before = small.data_ptr()
    spill.spill([large, small], tmp_path / "new", 512)
    assert list((tmp_path / "new").iterdir()) == []
    large.data[3].copy_(torch.arange(16.0))
    assert large.data.sum() == 120
    assert (large.shape, large.weight_loader, small.data_ptr()) == ((8, 16), "kept", before)


def test_a_disk_without_room_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(spill, "SMALLEST_BYTES", 64)

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="5 GB, beside as much for their file"):
        spill.spill([Parameter(torch.zeros(8, 16))], tmp_path, 5 * 10**9)
    assert list(tmp_path.iterdir()) == []
