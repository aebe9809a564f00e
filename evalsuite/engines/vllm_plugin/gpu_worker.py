"""vLLM's GPU worker with an expert cache; vLLM imports it by name where the cache is used."""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphWrapper
from vllm.compilation.cuda_graph import CUDAGraphWrapper
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.workspace import unlock_workspace

from evalsuite.engines.vllm_plugin import marlin_order, triton_tiles
from evalsuite.engines.vllm_plugin.device_cache import DeviceCache
from evalsuite.engines.vllm_plugin.layers import install
from evalsuite.engines.vllm_plugin.metrics import Publisher
from evalsuite.engines.vllm_plugin.worker import CacheReports

install()
triton_tiles.install()
marlin_order.install()


class CachedGPUWorker(CacheReports, Worker):
    """Tells the caches how many of a step's tokens are real: graphs pad a batch to a size that they have."""

    _on_device: Sequence[DeviceCache] = ()

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        loaded = super().load_model(*args, **kwargs)
        self._on_device = list(self._caches())
        if self._on_device:
            first = self._on_device[0]
            self._counts = torch.zeros(len(self._on_device), 4, dtype=torch.int64, device=first.device)
            self._counts_copy = torch.zeros(
                self._counts.shape, dtype=torch.int64, device="cpu", pin_memory=True
            )
            self._copied: torch.cuda.Event | None = None
            for row, cache in zip(self._counts, self._on_device, strict=True):
                cache.token_limit, cache.counts = first.token_limit, row
        return loaded

    def resize_expert_cache(self, size: int | None) -> str | None:
        """The same, and capture the CUDA graphs, which hold slots, again."""
        graphs = not self.vllm_config.model_config.enforce_eager
        if graphs and self.vllm_config.use_v2_model_runner:
            return "its second model runner holds CUDA graphs."
        if graphs:
            CUDAGraphWrapper.clear_all_graphs()
            BreakableCUDAGraphWrapper.clear_all_graphs()
        before = self._slot_bytes()
        super().resize_expert_cache(size)
        torch.cuda.empty_cache()  # what fewer slots leave is not this size's
        self.model_runner.model_memory_usage += self._slot_bytes() - before
        if graphs:
            unlock_workspace()
            self.model_runner.capture_model()
            self.clear_expert_cache()  # what the capture was routed to is nobody's request
        return None

    def _slot_bytes(self) -> int:
        return sum(slots.nbytes for cache in self._caches() for slots in cache.slots.values())

    def execute_model(self, scheduler_output: Any) -> Any:
        if self._on_device:
            self._check()  # where steps run ahead of their tokens, what the last ones copied
            self._on_device[0].token_limit.fill_(scheduler_output.total_num_scheduled_tokens)
        return super().execute_model(scheduler_output)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        sampled = super().sample_tokens(*args, **kwargs)
        self._check()
        return sampled

    def expert_cache_counters(self) -> dict[str, Any]:
        torch.cuda.synchronize()
        self._check()
        return super().expert_cache_counters()

    def shutdown(self) -> None:
        try:
            super().shutdown()
        finally:
            self._check()

    def _check(self) -> None:
        """Raises StorageError where experts did not come; every layer has the same store."""
        for cache in self._on_device[:1]:
            cache.check()

    def _publish(self, publisher: Publisher) -> None:
        """Without waiting for the device: what is left is a copy that was begun a period before."""
        if not self._on_device:
            super()._publish(publisher)
            return
        if self._copied is not None and self._copied.query():
            rows = zip(self._on_device, self._counts_copy, strict=True)
            publisher.leave(self._counters(tuple(cache.counters(row) for cache, row in rows)))
            self._copied = None
        if self._copied is None:
            self._counts_copy.copy_(self._counts, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
