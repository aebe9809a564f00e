"""Qwen3.5 without a vision part, for a vLLM that has the classes and does not serve them.

vLLM 0.26 uses them inside of the multimodal model only: it takes a text-only checkpoint for a multimodal one
and then refuses its configuration. Later releases list them, and nothing is done there.
"""

import sys
from typing import Any

MODELS = "evalsuite.engines.vllm_plugin.text_only_models"
CLASSES = {"Qwen3_5ForCausalLM": "TextOnlyQwen", "Qwen3_5MoeForCausalLM": "TextOnlyQwenMoe"}
MULTIMODAL = "Qwen3_5MoeForConditionalGeneration"
MROPE = ("mrope_section", "mrope_interleaved")


def serve_text_only() -> None:
    """Name the classes in vLLM's registry, unless it names them itself or has none of the family.

    Nothing is done where vLLM is not loaded.
    """
    if "vllm" not in sys.modules:
        return
    from vllm import ModelRegistry
    from vllm.model_executor.models import config

    known = ModelRegistry.get_supported_archs()
    if MULTIMODAL not in known:
        return
    settings = _settings(config)
    for architecture, name in CLASSES.items():
        if architecture not in known:
            ModelRegistry.register_model(architecture, f"{MODELS}:{name}")
            config.MODELS_CONFIG_MAP[architecture] = settings


def _settings(config: Any) -> Any:
    """What vLLM settles for the family, and positions of one dimension, as text has."""
    family = config.Qwen3_5ForConditionalGenerationConfig

    class TextOnlyConfig(family):
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            family.verify_and_update_config(vllm_config)
            rope = getattr(vllm_config.model_config.hf_text_config, "rope_parameters", None) or {}
            for name in MROPE:
                rope.pop(name, None)

    return TextOnlyConfig
