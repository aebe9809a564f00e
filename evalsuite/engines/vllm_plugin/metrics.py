"""The cache's counters on the ``/metrics`` of a vLLM server.

The counters are in the workers and the endpoint is in the API server's process, so the workers of each stage
of a pipeline leave theirs in a small file about once a second while steps run, and a Prometheus collector
reads the files when it is asked; what the last second before a pause counted comes with the next step, and
with the end. The name of the files' folder travels in the environment that vLLM's processes inherit, and the
folder is removed when the server ends, with whatever a killed worker was writing. A server with several API
processes (``--api-server-count``) collects through Prometheus' own files and does not show them.
"""

import atexit
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evalsuite.core.cache import CacheCounters

logger = logging.getLogger("vllm.hlwq_expert_cache")

VARIABLE = "HLWQ_EXPERT_CACHE_COUNTERS"
COUNTERS = "counters-{stage}.json"
PERIOD_S = 1.0
_registered: list[Any] = []


def publish() -> None:
    """Show counters on this process' ``/metrics``, and tell the workers where to leave them; once."""
    if _registered:
        return
    from prometheus_client import REGISTRY

    folder = Path(tempfile.mkdtemp(prefix="hlwq-expert-cache-"))
    os.environ[VARIABLE] = str(folder)
    atexit.register(_end, folder)
    collector: Any = Collector(folder)
    _registered.append(collector)
    REGISTRY.register(collector)


def _end(folder: Path) -> None:
    """One line for the log, from what the workers left last: vLLM may kill them before they can write one."""
    if not folder.exists():
        return
    ended = folder.rename(f"{folder}-ended")  # a worker that still lives finds no folder to write to
    if (left := what_is_left(ended)) is not None:
        logger.info("%s", summary(left))
    shutil.rmtree(ended, ignore_errors=True)


def summary(counters: CacheCounters) -> str:
    """One line for the log."""
    rate = "no step yet" if counters.hit_rate is None else f"hit rate {counters.hit_rate:.4f}"
    return (
        f"Expert cache, {counters.size} of {counters.experts} experts in {len(counters.layers)} layers, "
        f"{counters.policy}, {counters.store}: {rate}, {counters.hits} hits, {counters.misses} misses, "
        f"{counters.overflow_steps} overflow steps, {counters.bytes_moved} bytes moved"
    )


def what_is_left(folder: Path) -> CacheCounters | None:
    """The counters of all stages; None before the first step."""
    stages = [
        CacheCounters.model_validate_json(path.read_text())
        for path in sorted(folder.glob(COUNTERS.format(stage="*")))
    ]
    if not stages:
        return None
    first = next((stage for stage in stages if stage.layers), stages[0])  # a stage may have no experts
    return first.model_copy(update={"layers": tuple(layer for stage in stages for layer in stage.layers)})


class Collector:
    """Reads the files whenever Prometheus asks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        counters = what_is_left(self.folder)
        if counters is None:
            return
        name = "hlwq_expert_cache"
        yield GaugeMetricFamily(f"{name}_size", "Expert slots of each layer.", value=counters.size)
        for key, help_ in (
            ("hits", "Distinct experts of a step that were on the device."),
            ("misses", "Distinct experts of a step that had to be copied."),
            ("overflow_steps", "Steps with more distinct experts than slots."),
            ("bytes_moved", "Bytes copied to the device."),
        ):
            family = CounterMetricFamily(f"{name}_{key}", help_, labels=["layer"])
            for layer in counters.layers:
                family.add_metric([str(layer.layer)], getattr(layer, key))
            yield family


class Publisher:
    """A worker's end: leaves the counters of its stage of the pipeline in the folder, if there is one."""

    def __init__(self, stage: int) -> None:
        self._name = COUNTERS.format(stage=stage)
        name = os.environ.get(VARIABLE)
        self.folder = Path(name) if name else None
        self._next_s = 0.0
        self._failed = False

    def due(self) -> bool:
        """Whether it is time again."""
        if self.folder is None or time.monotonic() < self._next_s:
            return False
        self._next_s = time.monotonic() + PERIOD_S
        return True

    def leave(self, counters: CacheCounters) -> None:
        """Replace what was there, whole."""
        if self.folder is None:
            return
        fresh = self.folder / f"{os.getpid()}.new"  # with tensor parallelism each rank has its own
        try:
            fresh.write_text(counters.model_dump_json())
            fresh.replace(self.folder / self._name)
        except FileNotFoundError:  # the server has ended
            pass
        except OSError as error:  # no reason to stop serving
            if not self._failed:
                logger.warning("The expert cache's counters cannot be left in %s: %s.", self.folder, error)
            self._failed = True
