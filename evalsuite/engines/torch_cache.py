"""The expert cache in transformers' mixture-of-experts layers: their weights leave the module for a store.

A layer's call is one step: its distinct experts are served from slots, in as many groups as it takes. What an
expert makes of a token is kept per (token, k) and summed once at the end, in the order in which the uncached
layer sums. A step that overflows therefore costs copies and not precision: on a CPU the results are the
uncached layer's bit for bit at any number of slots, and on a GPU they differ by no more than what the grouped
matrix product makes of another grouping of the same rows.

The slots of a layer serve one caller at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from evalsuite.core.errors import UsageError
from evalsuite.core.spec import CachePolicy, CacheStore
from evalsuite.data.models import Checkpoint
from evalsuite.engines.cpu_experts import RowsByExpert, expert_modules
from evalsuite.engines.expert_weights import (
    DOWN,
    GATE_UP,
    PACKED_FIELDS,
    ExpertShape,
    experts_in_config,
    weights_of,
)
from evalsuite.experts.cache import ExpertCache, LayerCache
from evalsuite.experts.store import DiskStore, ExpertSource, Identity, PinnedStore

BY_ROWS, GROUPED = "cached_rows_of_64", "cached_grouped_mm"
DECODED_BYTES = 1 << 28  # of packed experts that are decoded at once on a GPU


@dataclass(frozen=True)
class Caching:
    """What is asked of an expert cache; see `evalsuite.core.spec.Serving`. Size None: all are resident."""

    size: int | None
    policy: CachePolicy = "lru"
    store: CacheStore = "pinned"


def require_experts(checkpoint: Checkpoint) -> None:
    """Refuse a cache for a model that has nothing to cache, before it is loaded.

    Raises:
        UsageError: config.json names no experts.
    """
    if not checkpoint.gguf and experts_in_config(checkpoint) is None:
        raise nothing_to_cache(checkpoint.name)


def nothing_to_cache(name: str) -> UsageError:
    return UsageError(
        f"{name} is a dense model: there is nothing to cache.",
        cause="an expert cache holds some of the experts of each layer, and this model has none.",
        todo="leave out --moe-expert-cache-size.",
    )


def install(
    source: ExpertSource,
    identity: Identity,
    shape: ExpertShape,
    modules: dict[int, Any],
    caching: Caching,
    device: torch.device,
) -> ExpertCache:
    """Move the experts of a model into a store and serve its layers from slots on `device`.

    Args:
        modules: the expert modules by layer, with or without their weights.

    Raises:
        StorageError, OutOfMemory: the store cannot hold the experts.
        UsageError: the policy or the size is impossible.
    """
    on_disk = caching.store == "disk"
    store = DiskStore(source, identity, device) if on_disk else PinnedStore(source, device)
    cache = ExpertCache(store, device, caching.policy)
    for layer, module in modules.items():
        for name in (GATE_UP, DOWN):
            module._parameters.pop(name, None)
        before = module.config._experts_implementation
        uncached = ALL_EXPERTS_FUNCTIONS.get(before, grouped_mm_experts_forward)
        module.cached = CachedLayer(cache.layers[layer], shape, uncached)
    for module in modules.values():
        module.config._experts_implementation = BY_ROWS if device.type == "cpu" else GROUPED
    try:
        cache.resize(caching.size)
    except BaseException:
        cache.close()
        raise
    return cache


def cached_parameters(model: Any) -> int:
    """Parameters that have left the model for a store."""
    layers = [m.cached for m in expert_modules(model) if "cached" in vars(m)]
    return sum(layer.shape.experts * layer.shape.parameters for layer in layers)


@dataclass(frozen=True)
class CachedLayer:
    """What an expert module has instead of its weights.

    Attributes:
        uncached: the implementation that the module had before.
    """

    slots: LayerCache
    shape: ExpertShape
    uncached: Any

    @property
    def plainly_resident(self) -> bool:
        """Every expert lies at its own number and as it is computed with: nothing is left to do."""
        return self.slots.policy is None and GATE_UP in self.slots.tensors


def rows_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """`cpu_experts.experts_forward` over slots."""
    layer: CachedLayer = self.cached
    tensors = layer.slots.tensors
    rows = RowsByExpert(hidden_states, top_k_index, self.num_experts)
    for group in layer.slots.serve(rows.experts):
        for expert, slot in group.items():
            rows.run(self, expert, *weights_of(tensors, slot, layer.shape, hidden_states.dtype))
    return rows.combine(top_k_weights)


def grouped_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' ``grouped_mm`` over slots."""
    layer: CachedLayer = self.cached
    if layer.plainly_resident:
        self.gate_up_proj, self.down_proj = (layer.slots.tensors[name] for name in (GATE_UP, DOWN))
        return layer.uncached(self, hidden_states, top_k_index, top_k_weights)
    tokens, k = top_k_index.shape
    experts = self.num_experts
    flat = top_k_index.reshape(-1)
    ones = torch.ones_like(flat, dtype=torch.int32)
    counts = torch.zeros(experts, dtype=torch.int32, device=flat.device).index_add_(0, flat, ones).tolist()
    out = hidden_states.new_empty(tokens * k, hidden_states.shape[1])
    for group in layer.slots.serve([expert for expert, count in enumerate(counts) if count]):
        for order, gate_up, down in _products(layer, group, hidden_states.dtype):
            # order: the expert at each row of the stacks of weights, or -1
            place = [len(order)] * experts
            for position, expert in enumerate(order):
                if expert >= 0:
                    place[expert] = position
            rows = [counts[expert] if expert >= 0 else 0 for expert in order]
            numbers = torch.tensor(place + rows, dtype=torch.int32).to(flat.device, non_blocking=True)
            ends = numbers[experts:].cumsum(0, dtype=torch.int32)
            # the rows of other groups have the highest place, and are left out
            chosen = torch.argsort(numbers[:experts][flat], stable=True)[: sum(rows)]
            up = grouped_mm(hidden_states[chosen // k], gate_up.transpose(-2, -1), offs=ends)
            out[chosen] = grouped_mm(self._apply_gate(up), down.transpose(-2, -1), offs=ends)
    weighted = out.view(tokens, k, -1) * top_k_weights[..., None]
    return weighted.sum(dim=1).to(hidden_states.dtype)


def _products(
    layer: CachedLayer, group: dict[int, int], dtype: torch.dtype
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Experts and their weights, as stacks that one grouped product takes."""
    tensors = layer.slots.tensors
    if GATE_UP in tensors:
        order = [-1] * len(tensors[GATE_UP])
        for expert, slot in group.items():
            order[slot] = expert
        yield order, tensors[GATE_UP], tensors[DOWN]
        return
    experts = sorted(group)
    step = max(1, DECODED_BYTES // (layer.shape.parameters * dtype.itemsize))
    for start in range(0, len(experts), step):
        part = experts[start : start + step]
        slots = torch.tensor([group[expert] for expert in part]).to(tensors[PACKED_FIELDS[0]].device)
        yield part, *weights_of(tensors, slots, layer.shape, dtype)


def cache_warnings(caching: Caching, model: Any) -> tuple[str, ...]:
    """What a reader must know about this size on this model."""
    experts = next(m.cached.shape.experts for m in expert_modules(model))
    top_k = model.config.get_text_config().num_experts_per_tok
    if caching.size is not None and caching.size >= experts:
        return (
            f"an expert cache of {caching.size} has room for all {experts} experts of a layer: each is "
            "copied once and stays",
        )
    if caching.size is not None and caching.size < top_k:
        return (
            f"an expert cache of {caching.size} is smaller than the {top_k} experts of one token: every step "
            "overflows",
        )
    return ()


ALL_EXPERTS_FUNCTIONS.register(BY_ROWS, rows_forward)
ALL_EXPERTS_FUNCTIONS.register(GROUPED, grouped_forward)
