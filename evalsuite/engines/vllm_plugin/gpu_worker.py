"""vLLM's GPU worker with an expert cache; vLLM imports it by name where the cache is used."""

from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from evalsuite.engines.vllm_plugin.device_cache import DeviceCache
from evalsuite.engines.vllm_plugin.layers import install
from evalsuite.engines.vllm_plugin.worker import CacheReports

install()


class CachedGPUWorker(CacheReports, Worker):
    """Tells the caches how many of a step's tokens are real: graphs pad a batch to a size that they have."""

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        loaded = super().load_model(*args, **kwargs)
        on_device = [cache for cache in self._caches() if isinstance(cache, DeviceCache)]
        self._token_limit = on_device[0].token_limit if on_device else None
        for cache in on_device[1:]:
            cache.token_limit = on_device[0].token_limit
        return loaded

    def execute_model(self, scheduler_output: Any) -> Any:
        if self._token_limit is not None:
            self._token_limit.fill_(scheduler_output.total_num_scheduled_tokens)
        return super().execute_model(scheduler_output)
