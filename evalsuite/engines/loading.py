"""Checkpoints into transformers models: safetensors, GGUF and quantized INT4, never a pickle.

Quantized weights are dequantised on load, so that BF16 and INT4 are scored by the same code. With an expert
cache the experts never enter the model: they go from the files into a store, and packed ones stay packed.
"""

import contextlib
import hashlib
import io
import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM

from evalsuite.core.errors import MeasurementError, MissingDependency, ModelError, first_line
from evalsuite.core.spec import canonical_json
from evalsuite.data.models import Checkpoint
from evalsuite.engines import cpu_experts
from evalsuite.engines.compute import out_of_memory
from evalsuite.engines.dequantize import (
    dequantize_state,
    is_quantized,
    quantization_of,
    quantized_parts,
)
from evalsuite.engines.expert_weights import (
    EXPERT,
    CheckpointExperts,
    ModelExperts,
    modules_by_layer,
    other_tensors,
    shape_of,
    without_experts,
)
from evalsuite.engines.torch_cache import Caching, cached_parameters, install, nothing_to_cache
from evalsuite.experts.cache import ExpertCache
from evalsuite.experts.store import DiskStore, Identity

CAUSAL_MODELS: Any = AutoModelForCausalLM  # its own types are not usable
DUMMY_SEED = 0
NOT_TEXT = ("visual", "vision", "mtp")  # parts of a checkpoint that a text-only model leaves aside


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode on its device, and what a record says about its weights.

    Attributes:
        cache: holds the experts that `model` is without.
        random: nothing was read but the configuration.
        parameters: of the whole checkpoint.
    """

    model: Any
    stored: str
    engaged: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    cache: ExpertCache | None = None
    random: bool = False

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters()) + cached_parameters(self.model)


def require_gguf() -> None:
    """Raises MissingDependency where the packages that read GGUF are not installed."""
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise MissingDependency(
            f"Reading GGUF needs {' and '.join(missing)}.", todo="pip install 'hlwq-eval[gguf]'"
        )


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
        quantized_parts(checkpoint.name, quantization_of(checkpoint.config()))


def load_model(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    *,
    trust_remote_code: bool,
    caching: Caching | None = None,
    dummy: bool = False,
) -> Loaded:
    """Load a causal language model.

    Args:
        caching: keep the experts in a store, and only some of them on the device.
        dummy: random weights in the geometry of config.json, the same in every process.

    Raises:
        ModelError: transformers does not know the architecture, or tensors are missing.
        MissingDependency: a GGUF file, and the packages that read it are not installed.
        UsageError: a cache for a model without experts.
        OutOfMemory: the weights do not fit.
        StorageError: the store of the experts cannot be written or read.
    """
    options: dict[str, Any] = {
        "dtype": dtype, "output_loading_info": True, "trust_remote_code": trust_remote_code,
        "ignore_mismatched_sizes": True,  # they are refused below, by name
    }  # fmt: skip
    what = f"The model {checkpoint.name}"
    apart = caching is not None and not dummy and CheckpointExperts.are_in(checkpoint)
    with quiet_transformers():
        try:
            with out_of_memory(what):
                if dummy:
                    loaded, info = _random_model(checkpoint, options)
                elif apart:
                    loaded, info = _load_without_experts(checkpoint, options)
                elif checkpoint.gguf:
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
        layers = cpu_experts.use_on(loaded.model) if device.type == "cpu" else 0
        experts = {"expert_layers": layers, "experts": cpu_experts.NAME} if layers else {}
        loaded = replace(loaded, engaged=loaded.engaged | experts)
        with out_of_memory(what):
            loaded.model.eval()
            if caching is not None:
                loaded = add_cache(loaded, checkpoint, device, dtype, caching, apart=apart, dummy=dummy)
            try:
                loaded.model.to(device)
            except BaseException:
                if loaded.cache is not None:
                    loaded.cache.close()
                raise
    return loaded


def add_cache(
    loaded: Loaded,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    caching: Caching,
    *,
    apart: bool = False,
    dummy: bool = False,
) -> Loaded:
    """Take the experts out of a model, or those of the checkpoint where the model is without them.

    Raises:
        UsageError: the model has no experts.
        StorageError, OutOfMemory: they cannot be kept.
    """
    modules = modules_by_layer(loaded.model)
    if not modules:
        raise nothing_to_cache(checkpoint.name)
    shape = shape_of(next(iter(modules.values())))
    identity = Identity(
        dummy_fingerprint(checkpoint) if dummy else checkpoint.fingerprint(),
        f"{checkpoint.name}, random weights" if dummy else checkpoint.name,
        str(checkpoint.folder / checkpoint.gguf if checkpoint.gguf else checkpoint.folder),
    )
    with ExitStack() as stack:
        if apart:
            source = stack.enter_context(closing(CheckpointExperts(checkpoint, shape, dtype)))
            if source.layers != tuple(modules):
                raise ModelError(
                    f"{checkpoint.name} has experts in layers {_few(source.layers)}, and the architecture "
                    f"in layers {_few(modules)}.",
                    todo="download the checkpoint again, or check that config.json belongs to it.",
                )
            packed = source.packed
        else:
            source, packed = ModelExperts(loaded.model), False
        cache = install(source, identity, shape, modules, caching, device)
    engaged = {
        "expert_layers": len(modules),
        "experts": "cached, packed as INT4 and decoded when used" if packed else "cached",
        "expert_store": caching.store,
    }
    if isinstance(cache.store, DiskStore):
        engaged["expert_file"] = "written" if cache.store.written else "found"
    return replace(
        loaded, engaged=loaded.engaged | engaged, warnings=loaded.warnings + cache.store.notes, cache=cache
    )


def _few(numbers: Iterable[int]) -> str:
    listed = list(numbers)
    return ", ".join(map(str, listed[:8])) + (", …" if len(listed) > 8 else "")


def dummy_fingerprint(checkpoint: Checkpoint) -> str:
    """Of random weights: they follow from the configuration alone."""
    text = canonical_json(checkpoint.config())
    return hashlib.sha256(f"dummy {DUMMY_SEED} {torch.__version__} {text}".encode()).hexdigest()


def _text_config(checkpoint: Checkpoint, options: dict[str, Any]) -> tuple[Any, Any]:
    """The configuration of the text model, and what quantization it declares.

    A multimodal checkpoint is run as the text model inside it, whichever part declares the quantization.
    """
    whole: Any = AutoConfig.from_pretrained(
        str(checkpoint.folder), trust_remote_code=options["trust_remote_code"]
    )
    config: Any = whole.get_text_config()
    holder = config if hasattr(config, "quantization_config") else whole
    if not hasattr(holder, "quantization_config"):
        return config, None
    quantization = holder.quantization_config
    del holder.quantization_config
    return config, quantization


def _random_model(checkpoint: Checkpoint, options: dict[str, Any]) -> tuple[Loaded, Any]:
    config, _ = _text_config(checkpoint, options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(DUMMY_SEED)
        model = CAUSAL_MODELS.from_config(config, dtype=options["dtype"])
    nothing: dict[str, Any] = {"mismatched_keys": [], "missing_keys": [], "unexpected_keys": []}
    warning = "random weights in the geometry of config.json: speed and memory only"
    loaded = Loaded(
        model, "nothing (random weights)", {"load_format": "dummy"}, warnings=(warning,), random=True
    )
    return loaded, nothing


def _load_without_experts(checkpoint: Checkpoint, options: dict[str, Any]) -> tuple[Loaded, Any]:
    """The model with empty expert modules, from the other tensors of its files."""
    config, quantization = _text_config(checkpoint, options)
    stored, count, state = f"{_config_dtype(checkpoint)} safetensors", 0, {}
    if quantization is None:
        state = other_tensors(checkpoint)
    else:
        method = quantization["quant_method"] if isinstance(quantization, dict) else quantization.quant_method
        stored = f"{method} safetensors"
        for tensor in dequantize_state(checkpoint.folder, without=EXPERT):
            state[tensor.name] = tensor.value.to(options["dtype"]) if tensor.was_quantized else tensor.value
            count += tensor.was_quantized
    model_class = without_experts(CAUSAL_MODELS._model_mapping[type(config)])
    model, info = model_class.from_pretrained(None, config=config, state_dict=state, **options)
    return Loaded(model, stored, {"dequantised_tensors": count} if count else {}), info


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
    config, quantization = _text_config(checkpoint, options)
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
