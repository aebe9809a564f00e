"""The expert cache of one layer with its policy on the host: slots, copies, groups, counters.

The rules are those of `evalsuite.experts.policy`. It serves engines whose device is the host itself; on a GPU
`device_cache` follows the same rules without a word from the host.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evalsuite.core.cache import LayerCounters
from evalsuite.engines.vllm_plugin.disk_store import DiskExperts
from evalsuite.engines.vllm_plugin.host_store import HostExperts
from evalsuite.experts.policy import EMPTY, make_policy


@dataclass(frozen=True)
class Group:
    """Experts of a step that are in slots now.

    Attributes:
        slot_of: the slot of each of the layer's experts, int32 [experts]; -1 for those without one and, where
            the step has more groups, for those outside this one.
        slots: the slot of each routed expert, int [tokens, top_k]; None where the step has more groups.
    """

    slot_of: Tensor
    slots: Tensor | None


class HostCache:
    """Slots on the device and the policy that fills them.

    Args:
        layer: the layer's number.
        slots: part to a tensor of `size` experts on the device, in the order of the store's parts.
        store: every expert of the layer.
        policy: name of the policy.
    """

    def __init__(
        self, layer: int, slots: Mapping[str, Tensor], store: HostExperts | DiskExperts, policy: str
    ) -> None:
        self.layer, self.slots, self.store, self.policy_name = layer, dict(slots), store, policy
        self.experts = store.experts
        self.device = next(iter(self.slots.values())).device
        self.clear()

    @property
    def size(self) -> int:
        return len(next(iter(self.slots.values())))

    def clear(self) -> None:
        """Forget what is in the slots, and every count."""
        self.policy = make_policy(self.policy_name, self.size, self.experts)
        self.reset_counters()

    def reset_counters(self) -> None:
        self._steps = self._hits = self._misses = self._overflow_steps = 0

    def resize(self, size: int) -> None:
        """Give the layer this many slots, all empty."""
        for tensor in self.slots.values():
            tensor.data = torch.empty((size, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
        self.clear()

    def serve(self, topk_ids: Tensor) -> Iterator[Group]:
        """Bring the experts of one step into slots, a group at a time.

        Args:
            topk_ids: experts of each token, int [tokens, top_k]; negative ones are nobody's.
        """
        wanted = [e for e in topk_ids.unique().tolist() if e >= 0]
        self._steps += 1
        self._overflow_steps += len(wanted) > self.size
        for placement in self.policy.serve(wanted):
            self._hits += placement.hits
            self._misses += len(placement.loads)
            self.store.fetch(placement.loads, self.slots)
            slot_of = np.full(self.experts, EMPTY, np.int32)
            slot_of[list(placement.slots)] = list(placement.slots.values())
            on_device = torch.from_numpy(slot_of).to(topk_ids.device)
            whole = len(placement.slots) == len(wanted)
            slots = on_device[topk_ids.long()].to(topk_ids.dtype) if whole else None
            yield Group(on_device, slots)

    def counters(self) -> LayerCounters:
        return LayerCounters(
            layer=self.layer,
            steps=self._steps,
            hits=self._hits,
            misses=self._misses,
            overflow_steps=self._overflow_steps,
            bytes_moved=self._misses * self.store.expert_bytes,
        )
