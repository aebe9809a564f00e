import pytest
import torch
from compressed_tensors.utils.match import is_match

from evalsuite.core.errors import ModelError
from evalsuite.quant.plan import plan_geometry
from evalsuite.quant.recipe import Recipe
from evalsuite.quant.rules import FAMILIES, family

QUANTIZED = {
    "llama": ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"],
    "qwen3": ["self_attn.k_proj", "mlp.up_proj"],
    "qwen3_moe": ["self_attn.v_proj", "mlp.experts.17.gate_proj", "mlp.experts.0.down_proj"],
    "qwen3_5": ["linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.out_proj", "mlp.up_proj"],
    "qwen3_5_moe": ["mlp.experts.255.up_proj", "mlp.shared_expert.down_proj", "self_attn.o_proj"],
}
KEPT = {
    "llama": ["input_layernorm", "post_attention_layernorm"],
    "qwen3": ["self_attn.q_norm", "self_attn.k_norm"],
    "qwen3_moe": ["mlp.gate"],
    "qwen3_5": ["linear_attn.in_proj_a", "linear_attn.in_proj_b", "linear_attn.conv1d", "linear_attn.norm"],
    "qwen3_5_moe": ["mlp.gate", "mlp.shared_expert_gate"],
}
OUTSIDE = ["lm_head", "model.embed_tokens", "model.norm"]
PREFIXES = ("model.layers.3.", "model.language_model.layers.3.")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("model_type", QUANTIZED)
def test_the_cards_table(model_type, prefix):
    rules = FAMILIES[model_type]
    for module in QUANTIZED[model_type]:
        assert not rules.rule_for(f"{prefix}{module}.weight").keep
        assert rules.rule_for(f"{prefix}{module}.bias").layer_class == "bias"
    for module in KEPT[model_type]:
        assert rules.rule_for(f"{prefix}{module}.weight").keep
    for module in OUTSIDE:
        assert rules.rule_for(f"{module}.weight").keep


def test_parameters_and_stacks():
    rules = FAMILIES["qwen3_5_moe"]
    assert rules.rule_for("model.language_model.layers.0.linear_attn.A_log").keep
    assert rules.rule_for("model.language_model.layers.0.linear_attn.dt_bias").keep
    assert not rules.rule_for("model.language_model.layers.0.mlp.experts.gate_up_proj").keep
    assert not rules.rule_for("model.language_model.layers.0.mlp.experts.down_proj").keep


def test_what_lies_outside_the_text_model_is_kept_before_any_other_rule():
    rules = FAMILIES["qwen3_5_moe"]
    assert rules.rule_for("mtp.layers.0.self_attn.q_proj.weight").layer_class == "multi-token head"
    assert rules.rule_for("mtp.layers.0.mlp.experts.gate_up_proj").layer_class == "multi-token head"
    assert rules.rule_for("model.visual.blocks.0.attn.qkv.bias").layer_class == "visual"


def test_every_rule_that_keeps_says_why():
    for rules in FAMILIES.values():
        assert all(len(rule.keep) > 10 for rule in rules.rules if rule.keep)


@pytest.mark.parametrize("model_type", QUANTIZED)
def test_ignore_list_covers_what_is_kept_and_nothing_else(model_type):
    """In compressed-tensors' own matching, also under the prefixes that vLLM uses."""
    ignore = FAMILIES[model_type].ignore
    linear = torch.nn.Linear(1, 1)
    for prefix in (*PREFIXES, "language_model.model.layers.3."):
        assert all(is_match(prefix + module, linear, ignore) for module in KEPT[model_type])
        assert not any(is_match(prefix + module, linear, ignore) for module in QUANTIZED[model_type])
    assert is_match("language_model.lm_head", linear, ignore)
    assert is_match("visual.blocks.0.mlp.linear_fc1", linear, ignore)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_tensor_of_transformers_own_models_is_known(model_type):
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type)
    assert plan_geometry(config, FAMILIES[model_type], Recipe()).bytes_after > 0


def test_an_unknown_tensor_is_an_error():
    with pytest.raises(ModelError, match="mystery"):
        FAMILIES["llama"].rule_for("model.layers.0.mystery.weight")


@pytest.mark.parametrize("config", [{"model_type": "gpt2"}, {}])
def test_an_unknown_architecture_names_the_known_ones(config):
    with pytest.raises(ModelError, match="qwen3_5_moe") as error:
        family(config)
    assert "llama" in str(error.value)
