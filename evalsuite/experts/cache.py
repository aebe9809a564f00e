"""The experts that are on the device: slots, filled from a store as the policy says.

On a GPU, copies run on a stream of their own. They start once the computation that used the slots before is
over, and the computation that needs them waits for them: both by events, without the host.
"""

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from evalsuite.core.cache import CacheCounters, LayerCounters
from evalsuite.experts.policy import Policy, make_policy
from evalsuite.experts.store import ExpertStore

PENDING_EVENTS = 64  # pairs of events whose time has not been read


class LayerCache:
    """The slots of one layer, for one thread at a time.

    Args:
        stream: for the copies; None on a CPU, where they are made at once.

    Attributes:
        tensors: each field of the experts in the slots, [slots, *shape].
        policy: None where every expert has a slot of its own number.
    """

    def __init__(
        self, store: ExpertStore, layer: int, device: torch.device, stream: "torch.cuda.Stream | None"
    ) -> None:
        self.layer = layer
        self.policy: Policy | None = None
        self._store, self._device, self._stream = store, device, stream
        self._slots = torch.empty(0)
        self._places: Sequence[Tensor] = ()
        self.tensors: dict[str, Tensor] = {}
        self.reset_counters()

    def allocate(self, size: int | None, policy: str) -> None:
        """Make `size` empty slots, or, where it is None, one for each expert, all filled."""
        slots = self._store.experts if size is None else size
        self.policy = None if size is None else make_policy(policy, slots, self._store.experts)
        # zeros, since a kernel may touch slots that it was given no rows for
        self._slots = torch.zeros(
            slots, self._store.layout.record_bytes, dtype=torch.uint8, device=self._device
        )
        self._places = self._slots.unbind()
        self.tensors = self._store.layout.views(self._slots)
        if size is None:
            with self._copying():
                self._store.fill(self.layer, [(expert, expert) for expert in range(slots)], self._places)
        self.reset_counters()

    def release(self) -> None:
        """Give the slots' memory back."""
        self.tensors, self._slots, self._places, self.policy = {}, torch.empty(0), (), None

    @property
    def bytes(self) -> int:
        return self._slots.nbytes

    def serve(self, wanted: Sequence[int]) -> Iterator[dict[int, int]]:
        """Put the experts of one step into slots, a group at a time.

        Args:
            wanted: the distinct experts of the step.

        Yields:
            expert to slot of one group. It stays in place until the next is asked for; what is queued on the
            current stream meanwhile finds the experts there.

        Raises:
            StorageError: the store cannot be read; the slots count as empty then.
        """
        if self.policy is None:
            yield {expert: expert for expert in sorted(wanted)}
            return
        self._steps += 1
        self._overflow_steps += len(wanted) > self.policy.slots
        for placement in self.policy.serve(wanted):
            if placement.loads:
                self._load(placement.loads)
            self._hits += placement.hits
            self._misses += len(placement.loads)
            yield placement.slots

    def _load(self, loads: Sequence[tuple[int, int]]) -> None:
        assert self.policy is not None
        try:
            with self._copying():
                self._store.fill(self.layer, loads, self._places)
        except BaseException:  # the policy believes that they have arrived
            self.policy = make_policy(self.policy.name, self.policy.slots, self.policy.experts)
            raise

    @contextmanager
    def _copying(self) -> Generator[None]:
        if self._stream is None:
            began = time.perf_counter()
            yield
            self._copy_s += time.perf_counter() - began
            return
        computing = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(computing)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(self._stream):
            begin.record()
            try:
                yield
            finally:
                end.record()
                computing.wait_event(end)
        self._timed.append((begin, end))
        if len(self._timed) > PENDING_EVENTS:
            self._read_times()

    def _read_times(self) -> None:
        """Add up the copies that are over."""
        for begin, end in self._timed:
            end.synchronize()
            self._copy_s += begin.elapsed_time(end) / 1000
        self._timed.clear()

    def reset_counters(self) -> None:
        self._steps = self._hits = self._misses = self._overflow_steps = 0
        self._copy_s = 0.0
        self._timed: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def counters(self) -> LayerCounters:
        """Counts since the last reset; `copy_s` from the moment a copy could start until it was over."""
        self._read_times()
        return LayerCounters(
            layer=self.layer,
            steps=self._steps,
            hits=self._hits,
            misses=self._misses,
            overflow_steps=self._overflow_steps,
            bytes_moved=self._misses * self._store.layout.record_bytes,
            copy_s=self._copy_s,
        )


class ExpertCache:
    """The caches of all layers of a model over one store, which it owns.

    Attributes:
        layers: layer number to its cache.
        size: slots of each layer; None while every expert is resident.
    """

    def __init__(self, store: ExpertStore, device: torch.device, policy: str) -> None:
        self.store, self.policy = store, policy
        self._device = device
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.layers = {layer: LayerCache(store, layer, device, stream) for layer in store.layers}
        self.size: int | None = None

    def resize(self, size: int | None) -> None:
        """Give every layer `size` empty slots, at most one an expert; None keeps all experts on the device.

        Counters start anew.

        Raises:
            UsageError: there is no such policy, or the size is below 1; the slots stay as they were.
        """
        if size is not None:
            make_policy(self.policy, size, self.store.experts)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # copies into the old slots may be under way
        for cache in self.layers.values():
            cache.release()
        self.size = None if size is None else min(size, self.store.experts)
        for cache in self.layers.values():
            cache.allocate(self.size, self.policy)

    @property
    def bytes(self) -> int:
        """Of all slots on the device."""
        return sum(cache.bytes for cache in self.layers.values())

    def reset_counters(self) -> None:
        for cache in self.layers.values():
            cache.reset_counters()

    def counters(self) -> CacheCounters | None:
        """Counts since the last reset; None while every expert is resident."""
        if self.size is None:
            return None
        return CacheCounters(
            size=self.size,
            experts=self.store.experts,
            policy=self.policy,
            store=self.store.kind,
            expert_bytes=self.store.layout.record_bytes,
            layers=tuple(cache.counters() for cache in self.layers.values()),
        )

    def close(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for cache in self.layers.values():
            cache.release()
        self.store.close()
