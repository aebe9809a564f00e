"""The classes that `text_only` names; what vLLM asks of a hybrid model, their multimodal relative answers."""

from typing import Any

from vllm.model_executor.models.interfaces import IsHybrid
from vllm.model_executor.models.qwen3_5 import (
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeForCausalLM,
)


class Hybrid(IsHybrid):
    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> Any:
        return Qwen3_5ForConditionalGeneration.get_mamba_state_dtype_from_config(vllm_config)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> Any:
        return Qwen3_5ForConditionalGeneration.get_mamba_state_shape_from_config(vllm_config)

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        return Qwen3_5ForConditionalGeneration.get_mamba_state_copy_func()


class TextOnlyQwen(Qwen3_5ForCausalLM, Hybrid): ...


class TextOnlyQwenMoe(Qwen3_5MoeForCausalLM, Hybrid): ...
