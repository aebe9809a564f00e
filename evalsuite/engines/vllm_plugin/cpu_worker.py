"""vLLM's CPU worker with an expert cache; vLLM imports it by name where the cache is used."""

from vllm.v1.worker.cpu_worker import CPUWorker

from evalsuite.engines.vllm_plugin import cpu_int4
from evalsuite.engines.vllm_plugin.layers import install
from evalsuite.engines.vllm_plugin.worker import CacheReports

install()
cpu_int4.install()


class CachedCPUWorker(CacheReports, CPUWorker):
    pass
