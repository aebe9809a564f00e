"""A model's sizes from its configuration alone: the real modules on the meta device, which holds no numbers.

Quantized weights are counted as compressed-tensors packs them: eight INT4 codes an int32, and a bfloat16
scale a group (https://github.com/vllm-project/compressed-tensors). Of a multimodal model, the text part
counts.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from evalsuite.core.errors import ModelError, first_line
from evalsuite.core.geometry import Geometry
from evalsuite.data.models import Checkpoint
from evalsuite.engines.loading import quiet_transformers

SCALE_BYTES = 2
FUSED_EXPERTS = re.compile(r"(.*\.experts)\.(gate_up|down)_proj$")
EXPERT = re.compile(r"\.experts(\.\d+)?\.")
LINEAR_ATTENTION = "linear_attention"


@dataclass(frozen=True)
class Matrices:
    """`count` equal tensors: the experts of a layer for one projection, or a single tensor."""

    name: str
    count: int
    shape: tuple[int, ...]
    is_linear: bool

    @property
    def weights(self) -> int:
        return self.count * math.prod(self.shape)


@dataclass(frozen=True)
class Int4:
    """compressed-tensors' INT4: which linear layers have it, and how many weights share a scale."""

    group_size: int
    ignore: tuple[str, ...]

    def covers(self, name: str) -> bool:
        """A configuration may name modules as the multimodal model does."""
        names = (name, name.replace("model.", "model.language_model.", 1))
        return not any(
            re.match(entry[3:], candidate) if entry.startswith("re:") else entry == candidate
            for entry in self.ignore
            for candidate in names
        )

    def bytes_of(self, matrices: Matrices) -> int:
        rows, columns = matrices.shape
        packed = rows * -(-columns // 8) * 4
        scales = rows * -(-columns // self.group_size) * SCALE_BYTES
        return matrices.count * (packed + scales)


def read_geometry(checkpoint: Checkpoint, dtype: str, *, dequantised: bool = False) -> Geometry:
    """Sizes of a checkpoint's text model.

    Args:
        dtype: of the weights that are not quantized, as they are held in memory.
        dequantised: quantized weights are held in `dtype` as well.

    Raises:
        ModelError: there is no configuration, or its architecture or quantization is not known here.
    """
    raw = checkpoint.config()
    if not raw:
        raise ModelError(f"{checkpoint.name} has no config.json, from which its sizes would be read.")
    int4 = None if dequantised else _int4(checkpoint.name, raw)
    config = _text_config(checkpoint)
    with quiet_transformers(), torch.device("meta"):
        try:
            model: Any = AutoModelForCausalLM.from_config(config)
        except (ValueError, KeyError, ImportError, AttributeError) as error:
            raise ModelError(
                f"The architecture of {checkpoint.name} is not known here.", cause=first_line(error)
            ) from error
    width = 4 if dtype == "float32" else 2
    total = dense = expert = token_weights = 0
    layers: set[str] = set()
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    experts = int(_value(config, "num_experts", "num_local_experts", "n_routed_experts"))
    top_k = int(_value(config, "num_experts_per_tok", "num_experts_per_token", "top_k_experts"))
    for matrices in _matrices(model):
        quantized = int4 is not None and matrices.is_linear and int4.covers(matrices.name)
        size = int4.bytes_of(matrices) if int4 and quantized else width * matrices.weights
        total += size
        if found := EXPERT.search(matrices.name + "."):
            layers.add(matrices.name[: found.start()])
            expert += size
            token_weights += matrices.weights * top_k // experts
        elif matrices.name != "embed_tokens" or head is embedding:
            dense += size
            token_weights += matrices.weights
    return Geometry(
        total_bytes=total,
        dense_bytes=dense,
        row_bytes=width * embedding.shape[1],
        expert_bytes=expert // (experts * len(layers)) if layers else 0,
        expert_layers=len(layers),
        experts=experts if layers else 0,
        top_k=top_k if layers else 0,
        kv_bytes_per_token=width * _kv_numbers(config),
        state_bytes=_state_bytes(config, width),
        token_weights=token_weights,
        context=_value(config, "max_position_embeddings") or None,
    )


def _matrices(model: Any) -> Iterator[Matrices]:
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    embedding = model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if parameter is embedding:
            yield Matrices("embed_tokens", 1, shape, False)
        elif (fused := FUSED_EXPERTS.match(name)) and len(shape) == 3:
            count, rows, columns = shape
            if fused[2] == "gate_up":
                yield Matrices(f"{fused[1]}.0.gate_proj", 2 * count, (rows // 2, columns), True)
            else:
                yield Matrices(f"{fused[1]}.0.down_proj", count, (rows, columns), True)
        else:
            module = name.rpartition(".")[0]
            yield Matrices(module, 1, shape, module in linear and len(shape) == 2)


def _int4(name: str, raw: dict[str, Any]) -> Int4 | None:
    quantization = raw.get("quantization_config") or (raw.get("text_config") or {}).get("quantization_config")
    if not quantization:
        return None
    groups = list((quantization.get("config_groups") or {}).values())
    weights = groups[0].get("weights") or {} if len(groups) == 1 else {}
    if quantization.get("format") != "pack-quantized" or weights.get("num_bits") != 4:
        raise ModelError(
            f"{name} is quantized in a way whose sizes are not known here: "
            f"{quantization.get('quant_method')}, {quantization.get('format')}."
        )
    return Int4(int(weights.get("group_size") or 128), tuple(quantization.get("ignore") or ()))


def _text_config(checkpoint: Checkpoint) -> Any:
    try:
        whole: Any = AutoConfig.from_pretrained(str(checkpoint.folder))
    except (ValueError, OSError, KeyError, json.JSONDecodeError) as error:
        raise ModelError(
            f"The configuration of {checkpoint.name} cannot be read.", cause=first_line(error)
        ) from error
    config = whole.get_text_config()
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return config


def _value(config: Any, *names: str) -> int:
    """The first of these that the configuration has, 0 where it has none; architectures spell differently."""
    return next((value for name in names if (value := getattr(config, name, None))), 0)


def _layer_types(config: Any) -> list[str]:
    return getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers


def _kv_numbers(config: Any) -> int:
    layers = sum(kind != LINEAR_ATTENTION for kind in _layer_types(config))
    if latent := _value(config, "kv_lora_rank"):
        return layers * (latent + _value(config, "qk_rope_head_dim"))
    heads = _value(config, "num_key_value_heads") or config.num_attention_heads
    head = _value(config, "head_dim") or config.hidden_size // config.num_attention_heads
    return 2 * layers * heads * head


def _state_bytes(config: Any, width: int) -> int:
    """A gated delta rule's matrix of each value head, in float32, and the inputs of the short convolution."""
    layers = _layer_types(config).count(LINEAR_ATTENTION)
    if not layers:
        return 0
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    matrix = 4 * config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    window = width * (2 * keys + values) * (config.linear_conv_kernel_dim - 1)
    return layers * (matrix + window)
