"""Qwen3.5 without a vision part, in a vLLM whose registry does not name it; that vLLM is not here."""

from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from evalsuite.engines.vllm_plugin.text_only import CLASSES, MODELS, MULTIMODAL, serve_text_only

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="tests/vllm_cpu/install.py was not run")


@pytest.fixture
def registered(monkeypatch):
    """What is added to a registry that names the multimodal model and, besides, what a test puts in."""
    from vllm import ModelRegistry
    from vllm.model_executor.models import config

    added, known = {}, {MULTIMODAL}
    monkeypatch.setattr(ModelRegistry, "get_supported_archs", lambda: known)
    monkeypatch.setattr(ModelRegistry, "register_model", lambda name, path: added.update({name: path}))
    monkeypatch.setattr(config, "MODELS_CONFIG_MAP", {})
    return added, known, config.MODELS_CONFIG_MAP


def test_what_is_not_named_is_added(registered):
    added, _, settings = registered
    serve_text_only()
    assert added == {name: f"{MODELS}:{cls}" for name, cls in CLASSES.items()}
    assert settings.keys() == added.keys()


def test_what_vllm_names_itself_stays(registered):
    added, known, settings = registered
    known.update(CLASSES)
    serve_text_only()
    assert added == settings == {}


def test_a_vllm_without_the_family_stays_as_it_is(registered):
    added, known, settings = registered
    known.clear()
    serve_text_only()
    assert added == settings == {}


def test_states_keep_their_precision_and_positions_have_one_dimension(registered):
    serve_text_only()
    rope = {"mrope_section": [11, 11, 10], "mrope_interleaved": True, "rope_theta": 1e7}
    text = SimpleNamespace(mamba_ssm_dtype="float32", rope_parameters=rope)
    asked = SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=text),
        cache_config=SimpleNamespace(mamba_ssm_cache_dtype="auto"),
    )
    registered[2]["Qwen3_5MoeForCausalLM"].verify_and_update_config(asked)
    assert asked.cache_config.mamba_ssm_cache_dtype == "float32"
    assert rope == {"rope_theta": 1e7}


@pytest.mark.parametrize(("architecture", "name"), CLASSES.items())
def test_the_classes_answer_as_their_multimodal_relative(architecture, name):
    qwen = import_module("vllm.model_executor.models.qwen3_5")
    models = import_module(MODELS)
    cls = getattr(models, name)
    assert issubclass(cls, getattr(qwen, architecture))
    assert issubclass(cls, models.Hybrid)  # the installed vLLM would do without, 0.26 would not
    assert cls.is_hybrid
    text = SimpleNamespace(
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=32, linear_value_head_dim=32,
        linear_conv_kernel_dim=4,
    )  # fmt: skip
    asked = SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.bfloat16, hf_text_config=text), speculative_config=None,
        cache_config=SimpleNamespace(mamba_cache_dtype="auto", mamba_ssm_cache_dtype="float32"),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
    )  # fmt: skip
    relative = qwen.Qwen3_5ForConditionalGeneration
    for method, arguments in (
        ("get_mamba_state_dtype_from_config", (asked,)), ("get_mamba_state_shape_from_config", (asked,)),
        ("get_mamba_state_copy_func", ()),
    ):  # fmt: skip
        assert getattr(models.Hybrid, method)(*arguments) == getattr(relative, method)(*arguments)
