"""The reading side, where it the pipeline's round trips do not reach: foreign and damaged checkpoints."""

import json

import pytest
import torch
from safetensors.torch import save_file

from evalsuite.core.errors import ModelError
from evalsuite.engines.dequantize import dequantize_state
from evalsuite.quant.pipeline import quantize
from evalsuite.quant.recipe import Recipe
from quant.files import load_state


@pytest.fixture
def int4(llama, tmp_path):
    quantize(llama, tmp_path / "int4", Recipe(), device="cpu")
    return tmp_path / "int4"


def edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def test_the_parts_of_a_weight_may_lie_in_different_files(int4):
    expected = {t.name: t.value for t in dequantize_state(int4)}
    state = load_state(int4)
    for path in int4.glob("*.safetensors"):
        path.unlink()
    scales = {name: state.pop(name) for name in list(state) if name.endswith("weight_scale")}
    save_file(scales, int4 / "a.safetensors")
    save_file(state, int4 / "b.safetensors")
    found = {t.name: t.value for t in dequantize_state(int4)}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_which_tensors_were_quantized(int4):
    tensors = list(dequantize_state(int4))
    quantized = {t.name for t in tensors if t.was_quantized}
    assert quantized == {t.name for t in tensors if "_proj." in t.name}
    assert all(t.value.dtype == torch.float32 for t in tensors if t.was_quantized)


@pytest.mark.parametrize(
    "change",
    [
        lambda q: q.update(quant_method="gptq"),
        lambda q: q.update(format="int-quantized"),
        lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits=8),
        lambda q: q["config_groups"]["group_0"]["weights"].update(symmetric=False),
        lambda q: q["config_groups"]["group_0"]["weights"].update(actorder="group"),
        lambda q: q["config_groups"].clear(),
    ],
)
def test_kinds_that_are_not_read_are_named(int4, change):
    edit(int4, change)
    with pytest.raises(ModelError, match="cannot be dequantised"):
        list(dequantize_state(int4))


def test_a_lost_part_is_an_error(int4):
    path = sorted(int4.glob("*.safetensors"))[0]
    state = load_state(int4)
    for other in int4.glob("*.safetensors"):
        other.unlink()
    lost = next(name for name in state if name.endswith("weight_scale"))
    del state[lost]
    save_file(state, path)
    with pytest.raises(ModelError, match="incomplete") as error:
        list(dequantize_state(int4))
    assert lost in str(error.value)
