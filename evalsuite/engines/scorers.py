"""Which engine scores a perplexity run, why, and what its samples depend on besides the spec.

torch is the reference: it reads every checkpoint the same way, quantized or not, and keeps no secrets about
its arithmetic. ``auto`` leaves it only for a checkpoint that it cannot read and vLLM might.
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from evalsuite.core.errors import ModelError, UsageError
from evalsuite.core.spec import PerplexitySpec, Serving
from evalsuite.data.models import Checkpoint
from evalsuite.engines.base import Scorer
from evalsuite.engines.vllm_arguments import built_for_cpu, engine_arguments, require_vllm, vllm_installed
from evalsuite.telemetry.machine import package_version

if TYPE_CHECKING:
    from evalsuite.engines.torch_cache import Caching


@dataclass(frozen=True)
class ScorerChoice:
    """The engine of a run.

    Attributes:
        why: for the record.
        identity: what must be equal for an unfinished run to be resumed.
    """

    engine: Literal["torch", "vllm"]
    why: str
    identity: dict[str, Any]


def check_scorer(spec: PerplexitySpec) -> None:
    """Refuse what no engine can do, before the model is looked for.

    Raises:
        UsageError, ModelError, MissingDependency: the request cannot be carried out on this machine.
    """
    if spec.engine == "server" or spec.server_url is not None:
        raise UsageError(
            "A server cannot score windows.",
            cause="the OpenAI-compatible interface gives no hidden states, which divergence and agreement "
            "need, and does not say whether a window's context came from its prefix cache.",
            todo="use --engine vllm, which runs the same vLLM in this process.",
        )
    if spec.device != "auto":
        from evalsuite.engines.compute import resolve_compute  # torch takes seconds to import

        resolve_compute(spec.device, spec.dtype)
    if spec.engine == "vllm":
        require_vllm()
        _check_vllm_device(spec)
    elif spec.engine == "torch":
        _check_torch(spec)


def choose_scorer(spec: PerplexitySpec, checkpoint: Checkpoint) -> ScorerChoice:
    """The engine for this checkpoint; no weight is read.

    Raises:
        UsageError, ModelError, MissingDependency: it cannot score this checkpoint as asked.
    """
    engine, why = _engine(spec, checkpoint)
    if engine == "vllm":
        _check_vllm_device(spec)
        engine_arguments(checkpoint, serving_of(spec))
        return ScorerChoice("vllm", why, _vllm_identity(spec))
    _check_torch(spec)
    if spec.moe_expert_cache_size is not None:
        from evalsuite.engines.torch_cache import require_experts

        require_experts(checkpoint)
    return ScorerChoice("torch", why, _torch_identity(spec))


def open_scorer(choice: ScorerChoice, spec: PerplexitySpec, checkpoint: Checkpoint) -> Scorer:
    """Load the model.

    Raises:
        EvalError: as `TorchScorer` or `VllmScorer`.
    """
    if choice.engine == "vllm":
        from evalsuite.engines.vllm_scorer import VllmScorer

        return VllmScorer(
            checkpoint,
            serving_of(spec),
            context=spec.protocol.context,
            device=_gpu_index(spec),
            keep_hidden=spec.keep_hidden,
        )
    from evalsuite.engines.torch import TorchScorer

    return TorchScorer(
        checkpoint,
        device=spec.device,
        dtype=spec.dtype,
        trust_remote_code=spec.trust_remote_code,
        keep_hidden=spec.keep_hidden,
        caching=_caching(spec),
    )


def _caching(spec: PerplexitySpec) -> "Caching | None":
    from evalsuite.engines.torch_cache import Caching

    if spec.moe_expert_cache_size is None:
        return None
    return Caching(spec.moe_expert_cache_size, spec.moe_expert_cache_policy, spec.moe_expert_store)


def serving_of(spec: PerplexitySpec) -> Serving:
    """How vLLM serves the model while it is scored."""
    return Serving(
        engine="vllm",
        dtype=spec.dtype,
        tensor_parallel_size=spec.tensor_parallel_size,
        enforce_eager=True,
        moe_expert_cache_size=spec.moe_expert_cache_size,
        moe_expert_cache_policy=spec.moe_expert_cache_policy,
        moe_expert_store=spec.moe_expert_store,
        gpu_memory_utilization=spec.gpu_memory_utilization,
        additional_config=spec.additional_config,
        trust_remote_code=spec.trust_remote_code,
    )


def _engine(spec: PerplexitySpec, checkpoint: Checkpoint) -> tuple[Literal["torch", "vllm"], str]:
    if spec.engine == "vllm":
        return "vllm", "asked for"
    if spec.engine == "torch":
        return "torch", "asked for"
    from evalsuite.engines.loading import require_readable

    try:
        require_readable(checkpoint)
    except ModelError as error:
        if vllm_installed() is None:
            raise
        return "vllm", f"torch cannot read this checkpoint: {error.cause or error.what}"
    if spec.tensor_parallel_size > 1:
        require_vllm()
        return "vllm", "torch scores on one device, and several were asked for"
    return "torch", "the reference, and it reads this checkpoint"


def _check_torch(spec: PerplexitySpec) -> None:
    if spec.tensor_parallel_size > 1:
        raise UsageError(
            f"--tensor-parallel-size {spec.tensor_parallel_size} has no effect on the torch engine, which "
            "scores on one device.",
            todo="use --engine vllm, or leave it out.",
        )
    for flag, given in (
        ("--additional-config", bool(spec.additional_config)),
        ("--gpu-memory-utilization", spec.gpu_memory_utilization is not None),
    ):
        if given:
            raise UsageError(
                f"{flag} is vLLM's, and torch scores this model.", todo="use --engine vllm, or leave it out."
            )


def _check_vllm_device(spec: PerplexitySpec) -> None:
    place = spec.device.partition(":")[0]
    if spec.device != "auto" and (place == "cpu") != built_for_cpu():
        raise UsageError(
            f"The installed vLLM {require_vllm()} cannot compute on {spec.device}.",
            cause="it is built for the CPU." if built_for_cpu() else "it is built for GPUs.",
            todo="use --engine torch, or leave --gpus out.",
        )
    if spec.tensor_parallel_size > 1 and place == "cuda":
        raise UsageError(
            f"--gpus names one GPU, and --tensor-parallel-size asks for {spec.tensor_parallel_size}.",
            todo="leave --gpus out; CUDA_VISIBLE_DEVICES chooses among several.",
        )


def _gpu_index(spec: PerplexitySpec) -> int | None:
    place, _, index = spec.device.partition(":")
    return int(index) if place == "cuda" else None


def _torch_identity(spec: PerplexitySpec) -> dict[str, Any]:
    from evalsuite.engines.torch import resolve_compute, torch_threads

    device, dtype = resolve_compute(spec.device, spec.dtype)
    return {
        "engine": "torch",
        "dtype": str(dtype),
        "device": device.type,
        "cpu_threads": torch_threads(),
        "torch": package_version("torch"),
        "transformers": package_version("transformers"),
    }


def _vllm_identity(spec: PerplexitySpec) -> dict[str, Any]:
    return {
        "engine": "vllm",
        "dtype": spec.dtype,
        "device": "cpu" if built_for_cpu() else "cuda",
        "cpu_threads": os.environ.get("OMP_NUM_THREADS") if built_for_cpu() else None,
        "torch": package_version("torch"),
        "vllm": require_vllm(),
    }
