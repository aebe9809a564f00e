"""Qwen3.5 without a vision part, in a vLLM whose registry does not name it; that vLLM is not here."""

from importlib import import_module
from importlib.util import find_spec

import pytest

from evalsuite.engines.vllm_plugin.text_only import CLASSES, MODELS, MULTIMODAL, serve_text_only

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="tests/vllm_cpu/install.py was not run")


@pytest.fixture
def registered(monkeypatch):
    """What is added to a registry that names the multimodal model and, besides, what a test puts in."""
    from vllm import ModelRegistry

    added, known = {}, {MULTIMODAL}
    monkeypatch.setattr(ModelRegistry, "get_supported_archs", lambda: known)
    monkeypatch.setattr(ModelRegistry, "register_model", lambda name, path: added.update({name: path}))
    return added, known


def test_what_is_not_named_is_added(registered):
    added, _ = registered
    serve_text_only()
    assert added == {name: f"{MODELS}:{cls}" for name, cls in CLASSES.items()}


def test_what_vllm_names_itself_stays(registered):
    added, known = registered
    known.update(CLASSES)
    serve_text_only()
    assert added == {}


def test_a_vllm_without_the_family_stays_as_it_is(registered):
    added, known = registered
    known.clear()
    serve_text_only()
    assert added == {}


@pytest.mark.parametrize(("architecture", "name"), CLASSES.items())
def test_the_classes_are_hybrid_ones_of_vllm(architecture, name):
    qwen = import_module("vllm.model_executor.models.qwen3_5")
    cls = getattr(import_module(MODELS), name)
    assert issubclass(cls, getattr(qwen, architecture))
    assert cls.is_hybrid
    copies = cls.get_mamba_state_copy_func()
    assert copies == qwen.Qwen3_5ForConditionalGeneration.get_mamba_state_copy_func()
