import shutil
from collections import namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from evalsuite.core.errors import ResumeMismatch, StorageError, UsageError
from evalsuite.quant.checkpoint import open_checkpoint
from evalsuite.quant.destination import Destination, ShardWriter
from evalsuite.quant.plan import TensorInfo, plan_shards
from evalsuite.quant.recipe import Recipe
from evalsuite.quant.rules import FAMILIES

DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I32": torch.int32,
    "I64": torch.int64, "U8": torch.uint8,
}  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(
    tensors=st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(1, 5), max_size=3)),
        min_size=1,
        max_size=6,
    ),
    order=st.randoms(use_true_random=False),
)
def test_shards_are_read_back_by_the_library(tmp_path_factory, tensors, order):
    path = tmp_path_factory.mktemp("shard") / "a.safetensors"
    infos = [TensorInfo(f"t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(tensors)]
    values = {
        info.name: torch.randint(0, 100, info.shape).to(DTYPES[dtype])
        for info, (dtype, _) in zip(infos, tensors, strict=True)
    }
    with path.open("wb") as file:
        writer = ShardWriter(file, infos)
        for info in order.sample(infos, len(infos)):
            pieces = values[info.name].split(2) if info.shape else [values[info.name]]
            assert writer.unfinished()
            for piece in pieces:
                writer.append(info.name, piece)
        assert not writer.unfinished()
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == values.keys()
        for name, value in values.items():
            assert torch.equal(file.get_tensor(name), value)
            assert file.get_tensor(name).dtype == value.dtype


@pytest.fixture
def make(llama, tmp_path):
    source = open_checkpoint(llama)

    def build(folder=None, **choices):
        recipe = Recipe(**choices)
        plan = plan_shards(source.shards, FAMILIES["llama"], recipe)
        return Destination(folder or tmp_path / "out", source, plan, recipe)

    return build


def test_an_existing_destination_is_not_touched(make, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists"):
        make()
    assert list((tmp_path / "out").iterdir()) == []


def test_a_dangling_link_counts_as_existing(make, tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="exists"):
        make()


def test_the_source_is_no_destination(make, llama, tmp_path):
    (tmp_path / "link").symlink_to(llama)
    for folder in (llama, llama / "inside", llama / ".." / llama.name, tmp_path / "link" / "inside"):
        with pytest.raises(UsageError, match="source"):
            make(folder)


def test_a_full_disk_is_seen_before_the_first_byte(make, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(StorageError, match="free"):
        make()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_is_said(make, monkeypatch):
    destination = make(method="rtn")
    shard = next(iter(destination._plan.shards))

    def full(*_):
        raise OSError(28, "No space left on device")

    def write():
        with destination.shard(shard) as writer:
            writer.append(shard.tensors[0].outputs[0].name, torch.zeros(1))

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(StorageError, match="No space left"):
        write()


def test_an_incomplete_shard_never_gets_its_name(make):
    destination = make()
    shard = next(iter(destination._plan.shards))
    with pytest.raises(StorageError, match="incomplete"), destination.shard(shard):
        pass
    assert not (destination.partial / shard.target).exists()


def test_another_recipes_remains_are_refused(make):
    make()
    make()  # the same one goes on
    with pytest.raises(ResumeMismatch, match="recipe"):
        make(hlwq_bits=4)


def test_remains_of_something_else_are_refused(make, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "precious").touch()
    with pytest.raises(ResumeMismatch):
        make()
    assert (tmp_path / "out.partial" / "precious").exists()
