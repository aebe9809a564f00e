"""Checkpoints into transformers models: safetensors, GGUF and quantized INT4, never a pickle.

Quantized weights are dequantised on load, so that BF16 and INT4 are scored by the same code.
"""

import contextlib
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM

from evalsuite.core.errors import MeasurementError, MissingDependency, ModelError, OutOfMemory, first_line
from evalsuite.data.models import Checkpoint
from evalsuite.engines import cpu_experts
from evalsuite.engines.dequantize import (
    dequantize_state,
    is_quantized,
    parts_of_quantized,
    quantization_of,
)

CAUSAL_MODELS: Any = AutoModelForCausalLM  # its own types are not usable
CPU_OUT_OF_MEMORY = "DefaultCPUAllocator"
NOT_TEXT = ("visual", "vision", "mtp")  # parts of a checkpoint that a text-only model leaves aside


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode on its device, and what a record says about its weights."""

    model: Any
    stored: str
    engaged: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def resolve_compute(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Device and type for ``auto``: CUDA if there is any, bfloat16 where the device computes in it.

    Raises:
        ModelError: the device does not exist.
    """
    if device == "auto":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"There is no GPU {place.index}: torch can use {torch.cuda.device_count()} on this machine.",
            todo="choose another with --gpus, or leave it out; `hlwq-eval doctor` lists them.",
        )
    if dtype != "auto":
        return place, getattr(torch, dtype)
    return place, torch.bfloat16 if _computes_bfloat16(place) else torch.float32


def _computes_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def require_gguf() -> None:
    """Raises MissingDependency where the packages that read GGUF are not installed."""
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise MissingDependency(
            f"Reading GGUF needs {' and '.join(missing)}.", todo="pip install 'hlwq-eval[gguf]'"
        )


@contextlib.contextmanager
def out_of_memory(what: str) -> Iterator[None]:
    """Both allocators' failures as one error.

    Raises:
        OutOfMemory: the device or the CPU could not allocate.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"{what} does not fit on the GPU.", cause=str(error).splitlines()[0]) from error
    except MemoryError as error:
        raise OutOfMemory(f"{what} does not fit in memory.") from error
    except RuntimeError as error:
        if CPU_OUT_OF_MEMORY not in str(error):
            raise
        raise OutOfMemory(f"{what} does not fit in memory.", cause=str(error).splitlines()[0]) from error


def require_readable(checkpoint: Checkpoint) -> None:
    """Raises ModelError where torch and transformers cannot read checkpoints like this; reads no weight."""
    if checkpoint.gguf or "auto_map" in checkpoint.config():  # code of its own, which only loading runs
        return
    try:
        config: Any = AutoConfig.from_pretrained(str(checkpoint.folder)).get_text_config()
        if type(config) not in CAUSAL_MODELS._model_mapping:
            raise ValueError(f"it has no causal language model for {config.model_type}")
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise ModelError(
            f"The installed transformers does not know the architecture of {checkpoint.name}.",
            cause=first_line(error),
            todo="install a newer one, or run it in vLLM (--engine vllm).",
        ) from error
    if is_quantized(checkpoint.config()):
        parts_of_quantized(checkpoint.name, quantization_of(checkpoint.config()))


def load_model(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, *, trust_remote_code: bool
) -> Loaded:
    """Load a causal language model for scoring.

    Raises:
        ModelError: transformers does not know the architecture, or tensors are missing.
        MissingDependency: a GGUF file, and the packages that read it are not installed.
        OutOfMemory: the weights do not fit.
    """
    options: dict[str, Any] = {
        "dtype": dtype, "output_loading_info": True, "trust_remote_code": trust_remote_code,
        "ignore_mismatched_sizes": True,  # they are refused below, by name
    }  # fmt: skip
    what = f"The model {checkpoint.name}"
    with quiet_transformers():
        try:
            with out_of_memory(what):
                if checkpoint.gguf:
                    loaded, info = _load_gguf(checkpoint, options)
                elif is_quantized(checkpoint.config()):
                    loaded, info = _load_quantized(checkpoint, options)
                else:
                    model, info = CAUSAL_MODELS.from_pretrained(
                        str(checkpoint.folder), use_safetensors=True, **options
                    )
                    loaded = Loaded(model, f"{_config_dtype(checkpoint)} safetensors")
        except (ValueError, KeyError, OSError, ImportError, RuntimeError, SafetensorError) as error:
            raise ModelError(
                f"{checkpoint.name} could not be loaded.",
                cause=first_line(error),
                todo="check that the folder is whole; an architecture that this transformers does not know "
                "needs a newer one, or --trust-remote-code if you trust its authors.",
            ) from error
        _refuse_incomplete(checkpoint, info)
        with out_of_memory(what):
            loaded.model.eval().to(device)
        layers = cpu_experts.use_on(loaded.model) if device.type == "cpu" else 0
    experts = {"expert_layers": layers, "experts": cpu_experts.NAME} if layers else {}
    return replace(loaded, engaged=loaded.engaged | experts)


def _load_gguf(checkpoint: Checkpoint, options: dict[str, Any]) -> tuple[Loaded, Any]:
    require_gguf()
    from gguf import GGMLQuantizationType, GGUFReader

    reader: Any = GGUFReader(str(checkpoint.weight_files()[0]))
    sizes: dict[str, int] = {}
    for tensor in reader.tensors:
        kind = GGMLQuantizationType(tensor.tensor_type).name
        sizes[kind] = sizes.get(kind, 0) + int(tensor.n_bytes)
    main = max(sizes, key=lambda kind: sizes[kind])
    with contextlib.redirect_stderr(io.StringIO()):  # its own progress bar cannot be switched off
        model, info = CAUSAL_MODELS.from_pretrained(
            str(checkpoint.folder), gguf_file=checkpoint.gguf, **options
        )
    warning = f"weights stored as GGUF {main} and dequantised on load: not the original BF16 weights"
    quantized = main not in ("F32", "F16", "BF16")
    return Loaded(model, f"GGUF {main}", {}, (warning,) if quantized else ()), info


def _load_quantized(checkpoint: Checkpoint, options: dict[str, Any]) -> tuple[Loaded, Any]:
    whole: Any = AutoConfig.from_pretrained(
        str(checkpoint.folder), trust_remote_code=options["trust_remote_code"]
    )
    # a multimodal checkpoint is scored as the text model inside it, whichever part declares the quantization
    config: Any = whole.get_text_config()
    holder = config if hasattr(config, "quantization_config") else whole
    quantization = holder.quantization_config
    del holder.quantization_config
    state: dict[str, torch.Tensor] = {}
    count = 0
    for tensor in dequantize_state(checkpoint.folder):
        state[tensor.name] = tensor.value.to(options["dtype"]) if tensor.was_quantized else tensor.value
        count += tensor.was_quantized
    if count == 0:
        raise MeasurementError(
            f"{checkpoint.name} says that it is quantized, and none of its tensors is.",
            todo="check its quantization_config and safetensors.",
        )
    model_class = CAUSAL_MODELS._model_mapping[type(config)]
    model, info = model_class.from_pretrained(None, config=config, state_dict=state, **options)
    method = quantization["quant_method"] if isinstance(quantization, dict) else quantization.quant_method
    return Loaded(model, f"{method} safetensors", {"dequantised_tensors": count}), info


def _refuse_incomplete(checkpoint: Checkpoint, info: Any) -> None:
    """transformers fills what is missing with random numbers, and would score them."""
    mismatched = sorted(str(key) for key, *_shapes in info["mismatched_keys"])
    missing = sorted(set(info["missing_keys"]) - set(mismatched))
    unused = sorted(key for key in info["unexpected_keys"] if not any(part in key for part in NOT_TEXT))
    for keys, problem in (
        (missing, "lacks"),
        (mismatched, "has the wrong shape for"),
        (unused, "has unused"),
    ):
        if keys:
            raise ModelError(
                f"{checkpoint.name} {problem} {len(keys)} tensors that the architecture "
                f"{'does not name' if keys is unused else 'needs'}, such as {keys[0]}.",
                todo="download the checkpoint again, or check that config.json belongs to it.",
            )


def _config_dtype(checkpoint: Checkpoint) -> str:
    config = checkpoint.config()
    text = config.get("text_config") or {}
    name = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or "float32"
    return {"bfloat16": "BF16", "float16": "FP16", "float32": "FP32"}.get(name, name)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Its loading bars and notes about optional kernels would tear the progress display."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        transformers_logging.enable_progress_bar()
