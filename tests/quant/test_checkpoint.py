import json

import pytest
import torch
from safetensors.torch import save_file

from evalsuite.core.errors import ModelError
from evalsuite.quant.checkpoint import INDEX, open_checkpoint
from quant.files import edit_config, load_state


def test_headers_are_those_of_the_files(checkpoints):
    for folder in checkpoints.values():
        found = {i.name: i for infos in open_checkpoint(folder).shards.values() for i in infos}
        state = load_state(folder)
        assert found.keys() == state.keys()
        for name, info in found.items():
            assert info.shape == tuple(state[name].shape)
            assert info.bytes == state[name].numel() * state[name].element_size()


@pytest.mark.parametrize("limit", [1, 1000, 10**9])
def test_pieces_are_the_tensor(llama, limit):
    checkpoint, state = open_checkpoint(llama), load_state(llama)
    for shard, infos in checkpoint.shards.items():
        with checkpoint.open(shard) as reader:
            for info in infos:
                pieces = list(reader.pieces(info, limit))
                assert torch.equal(torch.cat(pieces), state[info.name])
                assert all(len(piece) == 1 or piece.numel() <= limit for piece in pieces)


def test_no_checkpoint(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json"):
        open_checkpoint(tmp_path)
    with pytest.raises(ModelError, match=r"config\.json"):
        open_checkpoint(tmp_path / "nowhere")


def test_damaged_configuration(copy_of, llama):
    folder = copy_of(llama)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 1}'])
def test_a_damaged_index(copy_of, llama, text):
    folder = copy_of(llama)
    (folder / INDEX).write_text(text)
    with pytest.raises(ModelError, match="index"):
        open_checkpoint(folder)


def test_an_empty_declaration_is_none(copy_of, llama):
    folder = copy_of(llama)
    edit_config(folder, quantization_config=None, text_config=None)
    assert open_checkpoint(folder).shards


@pytest.mark.parametrize("place", ["top", "text"])
def test_quantized_already(copy_of, llama, place):
    folder = copy_of(llama)
    quantization = {"quantization_config": {"quant_method": "gptq"}}
    edit_config(folder, **(quantization if place == "top" else {"text_config": quantization}))
    with pytest.raises(ModelError, match="quantized already"):
        open_checkpoint(folder)


def test_quantized_already_without_saying_so(copy_of, llama):
    folder = copy_of(llama)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file({"model.layers.0.mlp.up_proj.weight_packed": torch.zeros(2, 2)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match="quantized already"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_are_not_opened(copy_of, llama, name):
    folder = copy_of(llama)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / name).write_bytes(b"anything")
    with pytest.raises(ModelError, match="safetensors") as error:
        open_checkpoint(folder)
    assert "pickle" in str(error.value)


@pytest.mark.parametrize("with_index", [True, False])
def test_a_missing_shard_is_named(copy_of, llama, with_index):
    folder = copy_of(llama)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    if not with_index:
        (folder / INDEX).unlink()
    with pytest.raises(ModelError, match=shards[1].name):
        open_checkpoint(folder)


def test_a_shard_cut_short(copy_of, llama):
    folder = copy_of(llama)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelError, match=shard.name):
        open_checkpoint(folder)


def test_files_outside_the_index_are_left_alone(copy_of, llama):
    folder = copy_of(llama)
    save_file({"other": torch.zeros(1)}, folder / "consolidated.safetensors")
    assert "consolidated.safetensors" not in open_checkpoint(folder).shards
    assert set(open_checkpoint(folder).shards) == set(
        json.loads((folder / INDEX).read_text())["weight_map"].values()
    )
