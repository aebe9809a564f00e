"""What the expert cache cannot be combined with, and the worker that an engine gets which can have it."""

import logging
from typing import Any

from evalsuite.core.errors import UsageError
from evalsuite.engines.vllm_plugin.metrics import publish
from evalsuite.engines.vllm_plugin.settings import CacheSettings
from evalsuite.engines.vllm_plugin.versions import find_adapter

logger = logging.getLogger("vllm.hlwq_expert_cache")

LARGEST_CAPTURE = 64  # tokens
WORKERS = {
    "vllm.v1.worker.gpu_worker.Worker": "evalsuite.engines.vllm_plugin.gpu_worker.CachedGPUWorker",
    "vllm.v1.worker.cpu_worker.CPUWorker": "evalsuite.engines.vllm_plugin.cpu_worker.CachedCPUWorker",
}


def prepare_arguments(engine_args: Any) -> None:
    """Check vLLM's arguments before its configuration is made of them.

    Raises:
        UsageError: this vLLM is unknown, or the worker is not vLLM's own.
    """
    from vllm.platforms import current_platform

    find_adapter()
    if engine_args.worker_cls != "auto":
        raise UsageError(
            f"The worker class is {engine_args.worker_cls}.",
            cause="the expert cache brings a worker of its own.",
            todo="leave --worker-cls away; --worker-extension-cls can be combined with the cache.",
        )
    device = current_platform.device_type
    if not engine_args.enforce_eager and device != "cuda":
        logger.warning("The expert cache on %s decides on the host: --enforce-eager is set.", device)
        engine_args.enforce_eager = True
    if not engine_args.enforce_eager:
        limit_captures(engine_args)


def limit_captures(engine_args: Any) -> None:
    """Capture graphs of small batches only, unless the user says which.

    A captured step has as many groups as its tokens could need, each with kernels of its own, so that a graph
    of 512 tokens over 8 slots would have tens of thousands of nodes and save nothing.
    """
    compilation = engine_args.compilation_config
    given = (
        engine_args.cudagraph_capture_sizes, engine_args.max_cudagraph_capture_size,
        compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size,
    )  # fmt: skip
    if all(value is None for value in given):
        sequences = engine_args.max_num_seqs or LARGEST_CAPTURE
        engine_args.max_cudagraph_capture_size = min(LARGEST_CAPTURE, 2 * sequences)


def prepare_configuration(config: Any, settings: CacheSettings) -> None:
    """Give a vLLM configuration the worker that keeps the cache; with room for all experts, leave it alone.

    Raises:
        UsageError: the configuration has something that the cache cannot be combined with, or no experts.
    """
    experts = config.model_config.get_num_experts()
    if not experts:
        raise UsageError(
            f"{config.model_config.model} has no experts to cache.",
            todo="leave --moe-expert-cache-size away: it is for mixture-of-experts models.",
        )
    for name, present, todo in _obstacles(config):
        if present:
            raise UsageError(f"The expert cache cannot be combined with {name}.", todo=todo)
    if settings.moe_expert_store == "disk" and config.speculative_config is not None:
        raise UsageError(
            "The expert cache cannot be combined with speculative decoding and the disk store.",
            todo="use --moe-expert-store pinned, or leave --speculative-config away.",
        )
    size = settings.moe_expert_cache_size
    if size > experts:
        raise UsageError(
            f"An expert cache of {size} is asked for, and a layer has {experts} experts.",
            todo=f"give a --moe-expert-cache-size below {experts}, or leave it away to keep them all.",
        )
    if size == experts:
        logger.warning("An expert cache of all %d experts of a layer: they stay there, uncached.", experts)
        return
    worker = config.parallel_config.worker_cls
    if worker not in WORKERS:
        raise UsageError(
            f"The expert cache has no worker for {worker}.", todo="it runs on NVIDIA GPUs and on CPUs."
        )
    config.parallel_config.worker_cls = WORKERS[worker]
    publish()


def _obstacles(config: Any) -> list[tuple[str, bool, str]]:
    from vllm import envs

    parallel, offload = config.parallel_config, config.offload_config
    return [
        (
            "expert parallelism",
            parallel.enable_expert_parallel or parallel.enable_eplb,
            "use --tensor-parallel-size without --enable-expert-parallel: each GPU then caches its share.",
        ),
        (
            "data parallelism",
            parallel.data_parallel_size > 1,
            "start one server for each GPU.",
        ),
        (
            "dual batch overlap",
            parallel.use_ubatching,
            "leave --enable-dbo and --ubatch-size away: its two halves would share the slots.",
        ),
        (
            "LoRA",
            config.lora_config is not None,
            "merge the adapter into the checkpoint, or leave --enable-lora away.",
        ),
        (
            "another offloading of weights",
            offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0,
            "leave --cpu-offload-gb and --offload-group-size away: the cache offloads the experts.",
        ),
        (
            "activations in fewer bits",
            envs.VLLM_MARLIN_INPUT_DTYPE is not None,
            "unset VLLM_MARLIN_INPUT_DTYPE: their scales are taken over a whole layer's experts.",
        ),
        (
            "sleep mode",
            config.model_config.enable_sleep_mode,
            "leave --enable-sleep-mode away.",
        ),
    ]
