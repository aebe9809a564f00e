"""vLLM's MoE methods with an expert cache: loading, and one step.

vLLM creates, fills, repacks and computes as ever; the cache only changes what it sees. While the checkpoint
is read the experts are on the CPU. Afterwards vLLM's own `process_weights_after_loading` is given a few
experts at a time, and what it makes of them goes to the store; the last time it is given as many as there are
slots, and the kernel that it then builds stands on the slots. A step hands that kernel slots instead of
experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from evalsuite.core.errors import UsageError
from evalsuite.engines.vllm_plugin.host_cache import HostCache
from evalsuite.engines.vllm_plugin.host_store import HostExperts, check_room
from evalsuite.engines.vllm_plugin.settings import CacheSettings, runs_on_device
from evalsuite.engines.vllm_plugin.versions import find_adapter

if TYPE_CHECKING:
    from evalsuite.engines.vllm_plugin.device_cache import DeviceCache

CHUNK = 32  # experts that are repacked at once


def install() -> None:
    """Let vLLM's MoE layers ask for a cached method; only a worker of ours calls this."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    choose: Callable[..., Any] = RoutedExperts._get_quant_method
    if getattr(choose, "_hlwq_expert_cache", False):
        return
    methods = find_adapter().methods()

    def choose_cached(self: Any, prefix: str, quant_config: Any, moe_config: Any) -> Any:
        from vllm.config import get_current_vllm_config

        method = choose(self, prefix, quant_config, moe_config)
        config = get_current_vllm_config()
        settings = CacheSettings.read(config.additional_config)
        if settings is not None and settings.moe_expert_cache_size < moe_config.num_experts:
            return with_cache(method, methods, settings, prefix, _moe_layers(config))
        return method

    choose_cached._hlwq_expert_cache = True  # pyright: ignore[reportFunctionMemberAccess]
    RoutedExperts._get_quant_method = choose_cached


def _moe_layers(config: Any) -> int:
    """How many layers of the model this process holds."""
    return config.model_config.get_num_layers(config.parallel_config)


def with_cache(
    method: Any, known: tuple[type[Any], ...], settings: CacheSettings, prefix: str, layers: int
) -> Any:
    """The same MoE method of vLLM's, cached; the one that is given is of no further use.

    Raises:
        UsageError: the method is none of those that can be cached.
    """
    cls = type(method)
    if cls not in known or method.is_monolithic:
        raise UsageError(
            f"The experts of {prefix} run through {cls.__name__}, which the expert cache does not know.",
            cause="it caches compressed-tensors INT4 experts through Marlin, and unquantized experts, where "
            "routing and experts are two kernels.",
            todo="set --moe-backend marlin (INT4) or triton (unquantized), or leave the cache away.",
        )
    # the name is the old one because vLLM looks some things up by it
    cached: Any = object.__new__(type(cls.__name__, (CachedExperts, cls), {}))
    cached.__dict__.update(method.__dict__)
    cached.cache_settings, cached.layer_prefix, cached.layers = settings, prefix, layers
    cached.cache = None
    return cached


class CachedExperts:
    """Put before one of vLLM's MoE methods; see `with_cache`."""

    cache: HostCache | DeviceCache | None
    cache_settings: CacheSettings
    layer_prefix: str
    layers: int
    moe_kernel: Any
    moe_quant_config: Any

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        foreign = set(layer._parameters)
        with torch.device("cpu"):
            super().create_weights(layer, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        self._names = [name for name in layer._parameters if name not in foreign]
        self._foreign = foreign
        layer_bytes = sum(layer._parameters[name].nbytes for name in self._names)
        check_room(self.layers * layer_bytes, f"the experts of {self.layers} layers")

    def process_weights_after_loading(self, layer: Any) -> None:
        raw = {name: layer._parameters[name].data for name in self._names}
        experts = layer.local_num_experts
        device = next(iter(raw.values())).device
        store: HostExperts | None = None
        for first in range(0, experts, CHUNK):
            parts = self._repack(layer, raw, first, min(CHUNK, experts - first))
            if store is None:
                names = _per_expert(parts, min(CHUNK, experts))
                shapes = {n: (tuple(parts[n].shape[1:]), parts[n].dtype) for n in names}
                store = HostExperts(shapes, experts, pin=device.type == "cuda")
            store.put(first, {name: parts[name].data for name in store.parts})
        assert store is not None
        slots = self._repack(layer, raw, 0, self.cache_settings.moe_expert_cache_size)
        for name in [n for n in layer._parameters if n not in self._foreign]:
            parameter = layer._parameters.pop(name)
            layer.__dict__[name] = parameter  # out of vLLM's sight, which would move it to the CPU again
        self.cache = _make_cache(
            layer_number(self.layer_prefix),
            {name: slots[name] for name in store.parts},
            store,
            self.cache_settings,
        )

    def _repack(self, layer: Any, raw: dict[str, Tensor], first: int, count: int) -> dict[str, Parameter]:
        """Let vLLM process some experts as if the layer had no others; parameters by name, each once."""
        for name in [n for n in layer._parameters if n not in self._foreign]:
            del layer._parameters[name]
        for name, tensor in raw.items():
            rows = tensor[first : first + count].clone()
            layer.register_parameter(name, Parameter(rows, requires_grad=False))
        self.moe_kernel = self.moe_quant_config = None
        super().process_weights_after_loading(layer)  # pyright: ignore[reportAttributeAccessIssue]
        once: dict[int, tuple[str, Parameter]] = {}
        for name, parameter in layer._parameters.items():
            if name not in self._foreign and parameter is not None:
                once.setdefault(id(parameter), (name, parameter))
        return dict(once.values())

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        assert self.cache is not None
        total: Tensor | None = None
        for group in self.cache.serve(topk_ids):
            shared = (shared_experts, shared_experts_input) if total is None else (None, None)
            if group.slots is not None:  # the whole step
                return self._compute(layer, x, topk_weights, group.slots, None, *shared)
            if total is None:
                total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
            if x.device.type == "cpu":
                self._add_pairs(total, layer, x, topk_weights, topk_ids, group.slot_of, *shared)
            else:
                total += self._compute(layer, x, topk_weights, topk_ids, group.slot_of, *shared)
        return torch.zeros_like(x) if total is None else total.to(x.dtype)

    def _add_pairs(
        self,
        total: Tensor,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        slot_of: Tensor,
        *shared: Any,
    ) -> None:
        """Add the group's experts for the tokens that chose them: vLLM's CPU kernels know no expert map."""
        ids = slot_of[topk_ids.long()].to(topk_ids.dtype)
        rows, place = (ids >= 0).nonzero(as_tuple=True)
        weights, ids = topk_weights[rows, place, None], ids[rows, place, None]
        total.index_add_(0, rows, self._compute(layer, x[rows], weights, ids, None, *shared).float())

    def _compute(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        expert_map: Tensor | None,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        return self.moe_kernel.apply(
            hidden_states=x,
            w1=layer.w13_weight,
            w2=layer.w2_weight,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            activation=layer.activation,
            # of the layer, not of the slots: vLLM picks block sizes by it
            global_num_experts=layer.global_num_experts,
            expert_map=expert_map,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
            shared_experts=shared_experts,
            shared_experts_input=shared_experts_input,
        )


def _make_cache(
    layer: int, slots: dict[str, Parameter], store: HostExperts, settings: CacheSettings
) -> HostCache | DeviceCache:
    device = next(iter(slots.values())).device
    if runs_on_device(settings, device.type):
        from evalsuite.engines.vllm_plugin.device_cache import DeviceCache

        return DeviceCache(layer, slots, store, settings.moe_expert_cache_policy)
    return HostCache(layer, slots, store, settings.moe_expert_cache_policy)


def _per_expert(parts: dict[str, Parameter], count: int) -> list[str]:
    """The parameters that hold something for each expert and that a kernel reads."""
    return [
        name
        for name, tensor in parts.items()
        if tensor.dim() and len(tensor) == count and tensor.numel() and not name.endswith("_shape")
    ]


def layer_number(prefix: str) -> int:
    """The number in a name like ``model.layers.7.mlp.experts``."""
    return int(next(part for part in prefix.split(".") if part.isdigit()))
