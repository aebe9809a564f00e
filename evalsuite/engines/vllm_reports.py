"""What vLLM's workers say of themselves, asked by remote call of an engine in this process or of a server."""

from typing import Any

from evalsuite.core.cache import CacheCounters
from evalsuite.core.errors import UsageError
from evalsuite.core.telemetry import EngineMemory
from evalsuite.engines.vllm_plugin import client


class WorkerReports:
    """The calls of `vllm_worker.WorkerExtension`, and of the expert cache's workers where there is one.

    Args:
        engine: calls a method of every worker by name.
        cached: whether experts are kept through this package's plugin.

    Attributes:
        facts: of each worker (`WorkerExtension.hlwq_facts`), as they are since the last resize.
    """

    def __init__(self, engine: client.Workers, cached: bool) -> None:
        self._engine, self._cached = engine, cached
        self.facts: list[dict[str, Any]] = list(engine.collective_rpc("hlwq_facts"))

    def resize_expert_cache(self, size: int | None) -> None:
        """Give every layer this many empty slots; None is one for each expert.

        Raises:
            UsageError: it has to load again for that.
        """
        if not self._cached:
            raise UsageError(
                "vLLM was loaded without an expert cache, and cannot have one without loading again.",
                todo="load it anew for each size.",
            )
        client.resize(self._engine, size)
        self.facts = list(self._engine.collective_rpc("hlwq_facts"))

    def reset_counters(self) -> None:
        self._engine.collective_rpc("hlwq_reset_peaks")
        if self._cached:
            client.reset_counters(self._engine)

    def expert_cache(self) -> CacheCounters | None:
        return client.read_counters(self._engine) if self._cached else None

    def memory(self) -> EngineMemory:
        weights = [worker["weights_bytes"] for worker in self.facts]
        peaks = self._engine.collective_rpc("hlwq_allocator_peaks")
        absent: dict[str, str] = {}
        if not all(weights):
            absent["weights"] = "vLLM measures its weights on GPUs only"
        if not all(peaks):
            absent["allocator"] = "torch counts allocations on GPUs only"
        return EngineMemory(
            weights_bytes=sum(weights) if all(weights) else None,
            kv_cache_bytes=sum(worker["kv_cache_bytes"] for worker in self.facts),
            allocated_peak_bytes=sum(peak["allocated"] for peak in peaks) if all(peaks) else None,
            reserved_peak_bytes=sum(peak["reserved"] for peak in peaks) if all(peaks) else None,
            absent=absent,
        )
