"""A model as vLLM serves it, for the record: what is the same whether the engine runs here or in a server."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

from evalsuite.core.cache import ALL_RESIDENT
from evalsuite.core.errors import ModelError, UsageError, first_line
from evalsuite.core.record import ModelFacts
from evalsuite.core.spec import Serving
from evalsuite.data.models import Checkpoint
from evalsuite.engines.dequantize import quantization_of
from evalsuite.engines.vllm_arguments import all_resident, cache_warnings, text_config

CAUSAL_MODELS: Any = AutoModelForCausalLM  # its own types are not usable
DUMMY_WARNING = (
    "dummy weights: times and memory are of this geometry, what it routes and writes is not a model's"
)
DTYPES = {"bfloat16": "BF16", "float16": "FP16", "float32": "FP32"}


def served_facts(
    checkpoint: Checkpoint,
    serving: Serving,
    *,
    dtype: str,
    device: str,
    device_name: str,
    engaged: dict[str, Any],
    warnings: tuple[str, ...] = (),
) -> ModelFacts:
    """The facts of a loaded model.

    Raises:
        ModelError: transformers does not know the architecture.
    """
    config = checkpoint.config()
    text = text_config(config)
    dummy = serving.load_format == "dummy"
    stored = quantization_of(config).get("quant_method") or geometry(config)
    architectures = config.get("architectures") or text.get("architectures") or [config.get("model_type", "")]
    return ModelFacts(
        name=checkpoint.name,
        architecture=str(architectures[0]),
        parameters=count_parameters(checkpoint, trust_remote_code=serving.trust_remote_code),
        vocabulary=int(text["vocab_size"]),
        max_context=text.get("max_position_embeddings"),
        fingerprint=checkpoint.fingerprint(),
        stored=f"dummy weights ({geometry(config)} geometry)" if dummy else f"{stored} safetensors",
        stored_bytes=sum(path.stat().st_size for path in checkpoint.weight_files()),
        computed=f"{dtype} on {device.partition(':')[0]}",
        dtype=dtype,
        device=device,
        device_name=device_name,
        engaged=engaged | ({"experts": ALL_RESIDENT} if all_resident(config, serving) else {}),
        warnings=(*((DUMMY_WARNING,) if dummy else ()), *cache_warnings(config, serving), *warnings),
    )


def refuse_too_long(prompts: Sequence[NDArray[np.int64]], output_len: int, longest: int | None) -> None:
    """Refuse requests of more tokens than the engine was set up for; None is no limit.

    Raises:
        UsageError: prompt and output are longer.
    """
    asked = max(map(len, prompts)) + output_len
    if longest is not None and asked > longest:
        raise UsageError(
            f"Prompt and output are {asked:,} tokens, and the engine was set up for {longest:,}.",
            todo="give a larger --max-model-len, or shorter --input-len and --output-len.",
        )


def geometry(config: dict[str, Any]) -> str:
    """How a config.json says that the weights are stored, such as ``BF16`` or ``INT4``."""
    text = text_config(config)
    quantization = config.get("quantization_config") or text.get("quantization_config")
    if quantization:
        groups = (quantization.get("config_groups") or {}).values()
        for weights in filter(None, (group.get("weights") for group in groups)):
            return f"{str(weights.get('type', 'int')).upper()}{weights['num_bits']}"
        bits = quantization.get("bits")
        return f"INT{bits}" if bits else str(quantization.get("quant_method", "quantized")).upper()
    for holder in (config, text):
        if name := holder.get("dtype") or holder.get("torch_dtype"):
            return DTYPES.get(name, str(name))
    return DTYPES["float32"]


def count_parameters(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> int:
    """Parameters of the text model that config.json describes; no weight is read.

    Raises:
        ModelError: transformers does not know the architecture.
    """
    try:
        whole: Any = AutoConfig.from_pretrained(str(checkpoint.folder), trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = CAUSAL_MODELS.from_config(whole.get_text_config(), trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise ModelError(
            f"The installed transformers does not know the architecture of {checkpoint.name}.",
            cause=first_line(error),
            todo="install a newer transformers.",
        ) from error
    return sum(parameter.numel() for parameter in model.parameters())
