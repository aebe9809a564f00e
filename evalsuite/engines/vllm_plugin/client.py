"""What the suite asks of an engine with an expert cache, through vLLM's ``collective_rpc``.

Every function takes something with ``collective_rpc(method, args=…) -> one result a worker``: `vllm.LLM`, or
a client of a server. The workers of a pipeline hold different layers; those of a tensor-parallel group hold
shares of the same layers and count the same.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from evalsuite.core.cache import CacheCounters, LayerCounters
from evalsuite.core.errors import UsageError


class Workers(Protocol):
    def collective_rpc(self, method: str, /, *, args: tuple[Any, ...] = ...) -> Sequence[Any]: ...


def read_counters(engine: Workers) -> CacheCounters:
    """Counts since the last reset, of every layer once."""
    parts = [CacheCounters.model_validate(part) for part in engine.collective_rpc("expert_cache_counters")]
    layers: dict[int, LayerCounters] = {}
    for part in parts:
        for layer in part.layers:
            layers.setdefault(layer.layer, layer)
    first = next((part for part in parts if part.layers), parts[0])
    return first.model_copy(update={"layers": tuple(layers[number] for number in sorted(layers))})


def reset_counters(engine: Workers) -> None:
    engine.collective_rpc("reset_expert_cache_counters")


def resize(engine: Workers, size: int | None) -> None:
    """Give every layer this many empty slots, in CUDA graphs too; None is one for each expert.

    Raises:
        UsageError: these workers cannot, as they were loaded.
    """
    refusals = engine.collective_rpc("resize_expert_cache", args=(size,))
    if refusal := next(filter(None, refusals), None):
        raise UsageError(
            f"vLLM cannot give every layer {size or 'all'} expert slots without loading again.",
            cause=str(refusal),
            todo="load it anew for each size.",
        )
