"""Sizes from a configuration, against the model itself and against its layers counted one by one."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from report.claims_files import SHIPPED, shipped

GEOMETRY = shipped().geometry["qwen3_5_moe_35b"]


def test_the_shipped_geometry_is_that_of_the_architecture():
    from transformers.models.qwen3_5_moe import Qwen3_5MoeTextConfig

    config = Qwen3_5MoeTextConfig()
    for name, value in GEOMETRY:
        if name not in ("source", "group_size", "full_attention_interval"):
            assert getattr(config, name) == value, name
    full = [kind == "full_attention" for kind in config.layer_types]
    assert sum(full) * GEOMETRY.full_attention_interval == len(full)


@pytest.mark.parametrize("key", ["int4", "bf16"])
def test_the_stand_ins_are_kept_and_have_the_shipped_geometry(key: str):
    (name,) = shipped().models[key].stand_ins
    config = json.loads((SHIPPED.parents[1] / "geometry" / name / "config.json").read_text())
    text = config.get("text_config", config)
    for field, value in GEOMETRY:
        if field in text:
            assert text[field] == value, field
    assert len(text.keys() & type(GEOMETRY).model_fields.keys()) >= 12


def test_parameters_are_those_of_the_model():
    import torch
    from transformers.models.qwen3_5_moe import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    with torch.device("meta"):
        model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(num_hidden_layers=4))
    assert GEOMETRY.with_layers(4).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("size", "gigabytes", "within"),
    [
        (GEOMETRY.expert_bytes("INT4"), 0.00162, 1e-5),
        (GEOMETRY.routed_bytes("INT4"), 16.61, 0.005),
        (GEOMETRY.embedding_weights * 2, 2.03, 0.005),
        (GEOMETRY.linear_weights * (0.5 + 2 / 128), 0.72, 0.005),
        (GEOMETRY.checkpoint_bytes("INT4"), 19.4, 0.05),
        *(
            (GEOMETRY.buffer_bytes("INT4", n), gb, 0.005)
            for n, gb in ((4, 0.26), (8, 0.52), (64, 4.15), (128, 8.3))
        ),
        (GEOMETRY.miss_bytes("INT4", 0.0), 0.519, 0.0005),
    ],
)
def test_sizes_that_were_worked_out_by_hand(size: float, gigabytes: float, within: float):
    assert size / 1e9 == pytest.approx(gigabytes, abs=within)


@given(slots=st.integers(1, 400), layers=st.integers(1, 80))
def test_a_buffer_grows_with_its_slots_up_to_all_experts(slots: int, layers: int):
    geometry = GEOMETRY.with_layers(layers)
    size = geometry.buffer_bytes("INT4", slots)
    assert size <= geometry.routed_bytes("INT4")
    assert (size == geometry.routed_bytes("INT4")) == (slots >= geometry.num_experts)
    assert math.isclose(
        geometry.checkpoint_bytes("INT4"), geometry.other_bytes("INT4") + geometry.buffer_bytes("INT4", 256)
    )


def test_a_token_reads_less_than_everything_and_more_than_its_experts():
    for stored in ("INT4", "BF16"):
        assert (
            GEOMETRY.miss_bytes(stored, 0) < GEOMETRY.token_bytes(stored) < GEOMETRY.checkpoint_bytes(stored)
        )
    assert GEOMETRY.miss_bytes("INT4", 0.75) == pytest.approx(GEOMETRY.miss_bytes("INT4", 0) / 4)
