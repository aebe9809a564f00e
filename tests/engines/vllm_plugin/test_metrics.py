"""What a server's processes leave of the cache's counters while they run, and that nothing of it is left after."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from evalsuite.core.cache import CacheCounters
from evalsuite.engines.vllm_plugin import metrics

pytest.importorskip("prometheus_client", reason="vLLM, whose /metrics this is about, is not installed")

SERVER = """
import logging, os
from pathlib import Path
from prometheus_client import REGISTRY, generate_latest
from evalsuite.core.cache import CacheCounters, LayerCounters
from evalsuite.engines.vllm_plugin import metrics

logging.basicConfig(level=logging.INFO, format="%(message)s")
metrics.publish()
print(generate_latest(REGISTRY).decode().count("hlwq"), "before the first step")
layer = LayerCounters(layer=3, steps=2, hits=30, misses=10, overflow_steps=1, bytes_moved=4096)
counters = CacheCounters(size=4, experts=16, policy="lru", store="disk", expert_bytes=512, layers=(layer,))
publisher = metrics.Publisher(0)
publisher.leave(counters)
later = counters.model_copy(update={"layers": (layer.model_copy(update={"layer": 40}),)})
metrics.Publisher(1).leave(later)  # the second stage of a pipeline
print(generate_latest(REGISTRY).decode())
folder = Path(os.environ[metrics.VARIABLE])
(folder / "1.new").write_text("{")  # a worker was killed while it wrote
metrics._end(folder)
publisher.leave(counters)  # a worker that outlives the server
"""


def test_a_full_disk_costs_the_counters_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv(metrics.VARIABLE, str(tmp_path))
    monkeypatch.setattr(Path, "write_text", full)
    said: list[str] = []  # not caplog: vLLM, once imported, keeps its loggers to itself
    monkeypatch.setattr(metrics.logger, "warning", lambda text, *values: said.append(text % values))
    publisher = metrics.Publisher(0)
    counters = CacheCounters(size=4, experts=16, policy="lru", store="disk", expert_bytes=512, layers=())
    publisher.leave(counters)
    publisher.leave(counters)
    (warning,) = said
    assert "No space left" in warning
    assert list(tmp_path.iterdir()) == []


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_servers_counters_and_what_it_leaves(tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PROMETHEUS")}
    environment |= {"TMPDIR": str(scratch), "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-c", SERVER],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "0 before the first step" in done.stdout
    for line in (
        'hits_total{layer="3"} 30.0',
        'misses_total{layer="3"} 10.0',
        'bytes_moved_total{layer="3"} 4096.0',
        'hits_total{layer="40"} 30.0',
    ):
        assert f"hlwq_expert_cache_{line}" in done.stdout
    assert done.stderr.count("hit rate 0.7500, 60 hits, 20 misses, 2 overflow steps, 8192 bytes moved") == 1
    assert list(scratch.iterdir()) == []
