"""vLLM's MoE methods with an expert cache: loading, and one step.

vLLM creates, fills, repacks and computes as ever; the cache only changes what it sees. While the checkpoint
is read the experts are on the CPU; random ones are drawn later, a layer at a time on the device. Afterwards
vLLM's own `process_weights_after_loading` is given a few experts at a time, and what it makes of them goes to
the store; the last time it is given as many as there are slots, and the kernel that it then builds stands on
the slots. A step hands that kernel slots instead of experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from evalsuite.core.errors import UsageError
from evalsuite.engines.vllm_plugin.disk_store import DiskExperts, ExpertFile, open_file
from evalsuite.engines.vllm_plugin.host_cache import HostCache
from evalsuite.engines.vllm_plugin.host_store import HostExperts, has_room, require_room
from evalsuite.engines.vllm_plugin.marlin_order import ordered_by_expert
from evalsuite.engines.vllm_plugin.settings import CacheSettings
from evalsuite.engines.vllm_plugin.spill import spill
from evalsuite.engines.vllm_plugin.triton_tiles import tiles_for
from evalsuite.engines.vllm_plugin.versions import find_adapter
from evalsuite.experts.files import cache_folder

if TYPE_CHECKING:
    from evalsuite.engines.vllm_plugin.device_cache import DeviceCache

CHUNK = 32  # experts that are repacked at once
# kernels, by vLLM's names, that compute on slots as on experts and leave out what an expert map leaves out
BACKENDS = {"wna16_backend": ("MARLIN", "EMULATION"), "unquantized_backend": ("TRITON", "CPU")}
_files: dict[int, ExpertFile] = {}  # of the engines that are loading now


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
            return with_cache(method, methods, settings, prefix, config)
        return method

    choose_cached._hlwq_expert_cache = True  # pyright: ignore[reportFunctionMemberAccess]
    RoutedExperts._get_quant_method = choose_cached


def abandon_files(error: BaseException) -> None:
    """Loading has failed: end the writers of expert files, which wait for layers that do not come."""
    while _files:
        _files.popitem()[1].abandon(error)


def with_cache(
    method: Any, known: tuple[type[Any], ...], settings: CacheSettings, prefix: str, config: Any
) -> Any:
    """The same MoE method of vLLM's, cached; the one that is given is of no further use.

    Raises:
        UsageError: the method is none of those that can be cached.
    """
    cls, backend = type(method), backend_of(method)
    if cls not in known or method.is_monolithic or backend is None:
        raise UsageError(
            f"The experts of {prefix} run through {cls.__name__}, by kernels that the expert cache does not "
            "know.",
            cause="it caches compressed-tensors INT4 experts through Marlin, and unquantized experts, where "
            "routing and experts are two kernels.",
            todo="set --moe-backend marlin (INT4) or triton (unquantized), or leave the cache away.",
        )
    # the name is the old one because vLLM looks some things up by it
    cached: Any = object.__new__(type(cls.__name__, (CachedExperts, cls), {}))
    cached.__dict__.update(method.__dict__)
    cached.cache_settings, cached.layer_prefix, cached.engine_config = settings, prefix, config
    cached.cache = None
    return cached


def backend_of(method: Any) -> str | None:
    """The kernels that a MoE method of vLLM's has chosen; None where the cache cannot work with them."""
    for attribute, known in BACKENDS.items():
        name = getattr(getattr(method, attribute, None), "name", None)
        if name in known:
            return name
    return None


class CachedExperts:
    """Put before one of vLLM's MoE methods; see `with_cache`."""

    cache: HostCache | DeviceCache | None
    cache_settings: CacheSettings
    layer_prefix: str
    engine_config: Any
    moe_kernel: Any
    moe_quant_config: Any

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        foreign = set(layer._parameters)
        self._device = torch.get_default_device()
        with torch.device("meta" if self._random else "cpu"):
            super().create_weights(layer, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        self._names = [name for name in layer._parameters if name not in foreign]
        self._foreign = foreign
        self._find_room([layer._parameters[name] for name in self._names])

    def _find_room(self, parameters: list[Parameter]) -> None:
        """Every layer is read before the first is stored, by each of this machine's ranks."""
        parallel = self.engine_config.parallel_config
        layers = self.engine_config.model_config.get_num_layers(parallel)
        wanted = layers * parallel.local_world_size * sum(parameter.nbytes for parameter in parameters)
        if self.cache_settings.moe_expert_store == "pinned":
            require_room(wanted, f"the experts of {layers} layers")
        elif not self._random and not has_room(wanted):
            spill(parameters, cache_folder(), wanted)

    @property
    def _random(self) -> bool:
        return self.engine_config.load_config.load_format == "dummy"

    def process_weights_after_loading(self, layer: Any) -> None:
        with self._device:
            raw = {
                name: _drawn(layer._parameters[name]) if self._random else layer._parameters[name].data
                for name in self._names
            }
        store = self._fill_store(layer, raw)
        slots = self._repack(layer, raw, 0, self.cache_settings.moe_expert_cache_size)
        for name in [n for n in layer._parameters if n not in self._foreign]:
            parameter = layer._parameters.pop(name)
            layer.__dict__[name] = parameter  # out of vLLM's sight, which would move it to the CPU again
        number = self._number(self.layer_prefix)
        self.cache = _make_cache(number, {n: slots[n] for n in store.names}, store, self.cache_settings)

    def _fill_store(self, layer: Any, raw: dict[str, Tensor]) -> HostExperts | DiskExperts:
        experts = layer.local_num_experts
        parts = self._repack(layer, raw, 0, min(CHUNK, experts))
        names = _per_expert(parts, min(CHUNK, experts))
        shapes = {name: (tuple(parts[name].shape[1:]), parts[name].dtype) for name in names}
        device = parts[names[0]].device

        def copy_into(targets: list[Tensor]) -> None:
            for first in range(0, experts, CHUNK):
                some = self._repack(layer, raw, first, min(CHUNK, experts - first))
                for name, target in zip(names, targets, strict=True):
                    target[first : first + len(some[name])].copy_(some[name].data)

        if self.cache_settings.moe_expert_store == "pinned":
            store = HostExperts(shapes, experts, pin=device.type == "cuda")
            copy_into(list(store.parts.values()))
            return store

        all_layers = tuple(map(self._number, self.engine_config.compilation_config.static_all_moe_layers))
        number = self._number(self.layer_prefix)
        if number == all_layers[0]:
            backend = backend_of(self)
            assert backend is not None, "with_cache() has seen to it"
            _files[id(self.engine_config)] = open_file(
                self.engine_config, backend, all_layers, experts, shapes, device
            )
        file = _files[id(self.engine_config)]

        def records() -> Tensor:
            made = torch.zeros(experts, file.layout.record_bytes, dtype=torch.uint8, device="cpu")
            copy_into(list(file.layout.views(made).values()))
            return made

        file.offer(number, records)
        if number == all_layers[-1]:
            _files.pop(id(self.engine_config)).finish()
        return DiskExperts(file, number, names)

    def _number(self, prefix: str) -> int:
        text = self.engine_config.model_config.hf_text_config
        return layer_number(prefix, getattr(text, "num_hidden_layers", 0))

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
                with ordered_by_expert(topk_ids, group.slot_of):
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
        with tiles_for(layer.global_num_experts):
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


def _drawn(parameter: Parameter) -> Tensor:
    """What vLLM fills a parameter with where no checkpoint is read, on the current device.

    As there, integers are whatever the memory held.
    """
    from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor
    from vllm.model_executor.model_loader.weight_utils import initialize_single_dummy_weight

    made = materialize_meta_tensor(parameter)
    initialize_single_dummy_weight(made)
    return made.data


def _make_cache(
    layer: int, slots: dict[str, Parameter], store: HostExperts | DiskExperts, settings: CacheSettings
) -> HostCache | DeviceCache:
    device = next(iter(slots.values())).device
    if device.type == "cuda":
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


def layer_number(prefix: str, hidden_layers: int) -> int:
    """The number in a name like ``model.layers.7.mlp.experts``; those of ``mtp.layers`` come after all."""
    parts = prefix.split(".")
    number = int(next(part for part in parts if part.isdigit()))
    return hidden_layers + number if "mtp" in parts else number
