"""The expert cache of one layer with its policy on the GPU: state, launches, counters.

How many groups a step can need follows from its shape: `tokens · top_k` experts at most, and never more than
the layer has. That many are launched, and those that turn out empty have nothing to copy and nothing to add;
what was routed is never asked for, so CUDA graphs hold steps of any size.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from evalsuite.core.cache import LayerCounters
from evalsuite.engines.vllm_plugin import kernels
from evalsuite.engines.vllm_plugin.copies import Loads, as_words
from evalsuite.engines.vllm_plugin.disk_store import DiskExperts
from evalsuite.engines.vllm_plugin.host_cache import Group
from evalsuite.engines.vllm_plugin.host_store import HostExperts

ALL_TOKENS = 2**31 - 1


class DeviceCache:
    """Slots on the device, filled by kernels from a store that they can reach.

    Args:
        layer: the layer's number.
        slots: part to a tensor of `size` experts on the device, in the order of the store's parts.
        store: every expert of the layer.
        policy: name of the policy.

    Attributes:
        token_limit: tokens of the coming step, int32 [1]; rows after them only pad a graph's shape. The
            worker gives all layers one tensor.
        counts: steps, hits, misses and overflow steps, int64 [4]; the worker makes it a row of one tensor.
    """

    def __init__(
        self, layer: int, slots: Mapping[str, Tensor], store: HostExperts | DiskExperts, policy: str
    ) -> None:
        self.layer, self.slots, self.store, self.policy_name = layer, dict(slots), store, policy
        self.experts = store.experts
        self.device = next(iter(self.slots.values())).device
        self._copies = store.copies(self.device)
        self.token_limit = torch.full((1,), ALL_TOKENS, dtype=torch.int32, device=self.device)
        self.counts = torch.zeros(4, dtype=torch.int64, device=self.device)
        self._allocate()

    @property
    def size(self) -> int:
        return len(next(iter(self.slots.values())))

    def _allocate(self) -> None:
        def state(count: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=self.device)

        self._targets = tuple(as_words(t.data) for t in self.slots.values())
        self._slot_of, self._position_of, self._flag_of = (state(self.experts) for _ in range(3))
        self._expert_in, self._last_used, self._worth, self._count = (state(self.size) for _ in range(4))
        self._frequency = state(self.size, torch.float32)
        self._scalars = state(3)
        self._loads = Loads(state(1), state(self.experts), state(self.size))
        self._expert_map = state(self.experts)
        self.clear()

    def clear(self) -> None:
        """Forget what is in the slots, and every count; in place, for the graphs that hold the state."""
        for tensor in (self._slot_of, self._expert_in):
            tensor.fill_(-1)
        for tensor in (self._last_used, self._worth, self._count, self._frequency, self._scalars):
            tensor.zero_()
        self.reset_counters()

    def reset_counters(self) -> None:
        self.counts.zero_()

    def resize(self, size: int) -> None:
        """Give the layer this many slots, all empty."""
        for tensor in self.slots.values():
            tensor.data = torch.zeros((size, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
        self._allocate()

    def serve(self, topk_ids: Tensor) -> Iterator[Group]:
        """Bring the experts of one step into slots, a group at a time.

        Args:
            topk_ids: experts of each token, int [tokens, top_k], contiguous; negative ones are nobody's.
        """
        ids = topk_ids.contiguous()
        groups = -(-min(ids.numel(), self.experts) // self.size)
        slots = torch.empty_like(ids)
        for index in range(groups):
            self._launch(ids, slots, index, groups)
            yield Group(self._slot_of, slots) if groups == 1 else Group(self._expert_map, None)

    def _launch(self, ids: Tensor, slots: Tensor, index: int, groups: int) -> None:
        width = _power_of_two(self.size)
        place: Any = kernels.place
        place[(1,)](
            ids, ids.numel(), self.token_limit, ids.shape[-1], slots, self._expert_map,
            self._slot_of, self._expert_in, self._last_used, self._worth, self._count, self._frequency,
            self._scalars, self.counts,
            self._position_of, self._flag_of, self._loads.expert, self._loads.slot, self._loads.count,
            index, is_first=index == 0, is_alone=groups == 1, slot_count=self.size, expert_count=self.experts,
            SLOTS=width, EXPERTS=_power_of_two(self.experts), IDS=32 if ids.numel() <= 32 else 128,
            policy=kernels.POLICY_CODES[self.policy_name],
            num_warps=32 if width > 128 else 16 if width > 32 else 8,
            enable_fp_fusion=False,  # the policy's float32 sums, to the bit
        )  # fmt: skip
        self._copies.launch(self._loads, self._targets, min(ids.numel(), self.size))

    def check(self) -> None:
        """Look whether the experts that were copied came; does not wait for the device.

        Raises:
            StorageError: some did not.
        """
        self._copies.check()

    def counters(self, counts: Tensor | None = None) -> LayerCounters:
        """The counts on the device, which waits for it, or a copy of them that has come to the host."""
        steps, hits, misses, overflows = (self.counts if counts is None else counts).tolist()
        return LayerCounters(
            layer=self.layer,
            steps=steps,
            hits=hits,
            misses=misses,
            overflow_steps=overflows,
            bytes_moved=misses * self.store.expert_bytes,
        )


def relabel(expert_ids: Tensor, slot_of: Tensor) -> None:
    """Put slots in the place of experts, int32 [blocks], in place."""
    kernel: Any = kernels.relabel
    kernel[(1,)](expert_ids, len(expert_ids), slot_of, expert_count=len(slot_of), BLOCK=256)


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 1).bit_length()
