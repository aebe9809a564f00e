"""vLLM's GPU worker with an expert cache; vLLM imports it by name where the cache is used."""

from vllm.v1.worker.gpu_worker import Worker

from evalsuite.engines.vllm_plugin.layers import install
from evalsuite.engines.vllm_plugin.worker import CacheReports

install()


class CachedGPUWorker(CacheReports, Worker):
    pass
