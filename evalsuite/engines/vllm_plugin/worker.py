"""What both workers have: the caches of the model they hold, and what can be asked of them from outside."""

from collections.abc import Iterator
from typing import Any

from evalsuite.core.cache import CacheCounters, LayerCounters
from evalsuite.engines.vllm_plugin.layers import CachedExperts, abandon_files
from evalsuite.engines.vllm_plugin.metrics import Publisher
from evalsuite.engines.vllm_plugin.settings import CacheSettings


class CacheReports:
    """Put before a worker of vLLM's; the methods are called by name through ``collective_rpc``."""

    vllm_config: Any
    model_runner: Any
    _publisher: Publisher | None = None

    def expert_cache_counters(self) -> dict[str, Any]:
        """`CacheCounters` of this worker's layers since the last reset, of all its ranks, as JSON."""
        return self._counters().model_dump(mode="json")

    def reset_expert_cache_counters(self) -> None:
        for cache in self._caches():
            cache.reset_counters()

    def clear_expert_cache(self) -> None:
        """Forget what the slots hold, and every count."""
        for cache in self._caches():
            cache.clear()

    def resize_expert_cache(self, size: int | None) -> str | None:
        """Give every layer this many empty slots; None is one for each expert.

        Returns:
            Why that cannot be done, or None when it is done.
        """
        for cache in self._caches():
            cache.resize(cache.experts if size is None else min(size, cache.experts))
        return None

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        try:
            loaded = super().load_model(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        except BaseException as error:
            abandon_files(error)
            raise
        parallel = self.vllm_config.parallel_config
        self._publisher = Publisher(parallel.rank * parallel.pipeline_parallel_size // parallel.world_size)
        return loaded

    def execute_model(self, scheduler_output: Any) -> Any:
        output = super().execute_model(scheduler_output)  # pyright: ignore[reportAttributeAccessIssue]
        if self._publisher is not None and self._publisher.due():
            self._publish(self._publisher)
        return output

    def _publish(self, publisher: Publisher) -> None:
        publisher.leave(self._counters())

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()  # pyright: ignore[reportAttributeAccessIssue]
        self.clear_expert_cache()  # what the warm-up was routed to is nobody's request
        return times

    def shutdown(self) -> None:
        if self._publisher is not None:  # the model was loaded
            self._publisher.leave(self._counters())
        super().shutdown()  # pyright: ignore[reportAttributeAccessIssue]

    def _caches(self) -> Iterator[Any]:
        runner = self.model_runner
        drafter = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
        for model in (runner.get_model(), getattr(drafter, "model", None)):
            for module in model.modules() if model is not None else ():
                method = getattr(module, "quant_method", None)
                if isinstance(method, CachedExperts) and method.cache is not None:
                    yield method.cache

    def _counters(self, layers: tuple[LayerCounters, ...] | None = None) -> CacheCounters:
        settings = CacheSettings.read(self.vllm_config.additional_config)
        assert settings is not None
        caches = list(self._caches())
        first = next(iter(caches), None)  # a stage of a pipeline may have none
        rank = CacheCounters(
            size=first.size if first else settings.moe_expert_cache_size,
            experts=first.experts if first else self.vllm_config.model_config.get_num_experts(),
            policy=settings.moe_expert_cache_policy,
            store=settings.moe_expert_store,
            expert_bytes=first.store.expert_bytes if first else 0,
            layers=tuple(cache.counters() for cache in caches) if layers is None else layers,
        )
        return rank.of_group(self.vllm_config.parallel_config.tensor_parallel_size)
