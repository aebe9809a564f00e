import re

import pytest
from transformers import Qwen3_5MoeTextConfig

from evalsuite.core.errors import ModelError, UsageError
from evalsuite.quant.plan import TensorInfo, plan_geometry, plan_shards
from evalsuite.quant.recipe import Recipe
from evalsuite.quant.rules import FAMILIES

MOE = FAMILIES["qwen3_5_moe"]
EXPERTS = "model.language_model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def geometry():
    """The 35B-A3B: 40 layers of 256 experts, which are the defaults of transformers' configuration."""
    return plan_geometry(Qwen3_5MoeTextConfig(), MOE, Recipe())


def test_35b_names_every_expert(geometry):
    names = {output.name for output in geometry.outputs}
    experts = {re.sub(r"\.weight_\w+$", "", name) for name in names if ".experts." in name}
    assert len(experts) == 30_720 == 40 * 256 * 3
    assert "model.layers.39.mlp.experts.255.down_proj.weight_packed" in names
    for module in experts:
        assert {f"{module}.weight_packed", f"{module}.weight_scale", f"{module}.weight_shape"} <= names


def test_35b_linears_and_what_stays(geometry):
    coded = [t for t in geometry.tensors if t.fate == "quantized" and t.layer_class != "experts"]
    # 30 linear-attention layers of 3, 10 attention layers of 4, and 3 of a shared expert in all 40.
    assert len(coded) == 30 * 3 + 10 * 4 + 40 * 3
    kept = [t for t in geometry.tensors if t.fate == "kept"]
    # Embedding, head, last norm; two norms and two gates a layer; six more in linear attention, two in full.
    assert len(kept) == 3 + 40 * 4 + 30 * 6 + 10 * 2
    assert not [t for t in geometry.tensors if t.fate == "unfit"]


def test_35b_sizes(geometry):
    def gigabytes(*classes):
        tensors = (t for t in geometry.tensors if t.layer_class in classes)
        return sum(output.bytes for t in tensors for output in t.outputs) / 1e9

    assert geometry.bytes_after == pytest.approx(19.4e9, rel=0.01)
    assert gigabytes("experts") == pytest.approx(16.61, abs=0.01)
    assert gigabytes("embedding", "head") == pytest.approx(2.03, abs=0.01)
    assert gigabytes("attention", "linear attention", "shared expert") == pytest.approx(0.72, abs=0.01)
    one = [o.bytes for o in geometry.outputs if o.name.startswith("model.layers.0.mlp.experts.0.")]
    assert sum(one) == pytest.approx(1.62e6, rel=0.005)


def test_shapes_of_each_format():
    info = TensorInfo("model.layers.0.self_attn.q_proj.weight", "BF16", (64, 200))

    def outputs(**choices):
        plan = plan_shards({"a": [info]}, FAMILIES["llama"], Recipe(**choices))
        return {o.name.rpartition(".")[2]: (o.dtype, o.shape) for o in plan.outputs}

    assert outputs(format="hlwq") == {
        "weight_codes": ("U8", (64, 2 * 128 * 5 // 8)),
        "weight_norms": ("F16", (64, 2)),
        "weight_shape": ("I64", (2,)),
    }
    assert outputs(format="bf16") == {"weight": ("BF16", (64, 200))}
    with pytest.raises(UsageError, match="No weight") as error:
        outputs(format="int4")
    assert "in-dimension 200 is not a multiple of the group of 128" in str(error.value)


def test_a_stack_becomes_one_matrix_an_expert():
    stack = [
        TensorInfo(f"{EXPERTS}.gate_up_proj", "BF16", (2, 64, 128)),
        TensorInfo(f"{EXPERTS}.down_proj", "BF16", (2, 128, 256)),
    ]
    plan = plan_shards({"a": stack}, MOE, Recipe())
    shapes = {o.name: o.shape for o in plan.outputs if o.name.endswith("weight_packed")}
    assert shapes == {
        f"{EXPERTS}.{e}.{p}.weight_packed": (128, 32) if p == "down_proj" else (32, 16)
        for e in range(2)
        for p in ("gate_proj", "up_proj", "down_proj")
    }


def test_experts_are_quantized_together_or_not_at_all():
    infos = [
        TensorInfo(f"{EXPERTS}.0.gate_proj.weight", "BF16", (64, 128)),
        TensorInfo(f"{EXPERTS}.0.down_proj.weight", "BF16", (128, 64)),
        TensorInfo(f"{EXPERTS}.1.gate_proj.weight", "BF16", (64, 128)),
        TensorInfo("model.language_model.layers.1.self_attn.q_proj.weight", "BF16", (128, 128)),
    ]
    plan = plan_shards({"a": infos}, MOE, Recipe())
    assert [t.fate for t in plan.tensors] == ["unfit", "unfit", "unfit", "quantized"]
    assert all("in-dimension 64" in t.reason for t in plan.tensors if t.fate == "unfit")
    unfit = plan.ignore[-1].removeprefix("re:")
    for name in ("model.layers.1.mlp.experts.1.down_proj", "language_model.model.layers.1.mlp.experts"):
        assert re.match(unfit, name)
    assert not re.match(unfit, "model.layers.11.mlp.experts.1.down_proj")
    # Alone, each projection is judged by its own width: no kernel has to run them together.
    decoded = plan_shards({"a": infos}, MOE, Recipe(method="rtn", format="bf16"))
    assert [t.fate for t in decoded.tensors] == ["quantized", "unfit", "quantized", "quantized"]


def test_integers_are_not_weights():
    info = TensorInfo("model.layers.0.self_attn.q_proj.weight", "I8", (128, 128))
    with pytest.raises(ModelError, match="q_proj"):
        plan_shards({"a": [info]}, FAMILIES["llama"], Recipe())
