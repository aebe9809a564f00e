"""The real ``vllm serve``, on the CPU, without and with an expert cache."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from vllm_cpu.tiny_moe import write_tiny_moe

from engines import tiny
from engines.scripted_server import Script, serving
from engines.test_vllm_offline import ENVIRONMENT, MISSING, logits_after, qwen3_moe
from evalsuite.core.errors import EngineDied, ModelError, OutOfMemory, UsageError
from evalsuite.core.spec import Serving
from evalsuite.data.models import find_checkpoint
from evalsuite.engines.process_tree import members
from evalsuite.engines.vllm_server import ServerGenerator

needs_vllm = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.mark.slow
@needs_vllm
def test_a_server_from_start_to_end(tmp_path, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    folder = tiny.write(qwen3_moe(), tmp_path / "moe")
    prompts = [np.array([(5 * i + k) % 257 for i in range(16)]) for k in range(4)]
    said, first = [], []
    serving = Serving(engine="server", dtype="float32", enforce_eager=True, max_model_len=64)
    loaded = ServerGenerator(find_checkpoint(str(folder)), serving, tmp_path / "log", said.append)
    try:
        session = loaded._server.pid
        assert members(session)
        results = loaded.generate(prompts, 10, lambda: first.append(time.monotonic()))
        with pytest.raises(UsageError) as caught:
            loaded.generate(prompts[:1], 100, lambda: None)
        memory = loaded.memory()
    finally:
        loaded.close()
    assert members(session) == []

    assert "116 tokens, and the engine was set up for 64" in caught.value.what
    for prompt, result in zip(prompts, results, strict=True):
        expected = logits_after(folder, prompt.tolist(), result.ids.tolist()).argmax(-1)
        assert torch.equal(torch.from_numpy(result.ids), expected)
        assert result.submitted_s < result.token_s[0]
        assert np.all(np.diff(result.token_s) >= 0)
        assert result.token_s[-1] > result.token_s[0]  # streamed, not sent at the end
    assert len(first) == 1
    assert max(result.token_s[0] for result in results) <= first[0]
    assert len(said) == len(set(said)) > 3
    assert 0 < loaded.load.weights_s < loaded.load.warmup_s + loaded.load.weights_s < loaded.load.total_s
    assert memory.kv_cache_bytes == 2**30
    assert memory.absent["allocator"]
    facts = loaded.facts
    assert (facts.name, facts.dtype, facts.device) == ("moe", "float32", "cpu")
    assert facts.engaged["server"] == "started"
    assert facts.engaged["max_model_len"] == 64


@pytest.mark.slow
@needs_vllm
def test_a_server_with_an_expert_cache_is_asked_for_counters_and_sizes(tmp_path, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    folder = write_tiny_moe(tmp_path / "moe", int4=True, experts=16, top_k=2, layers=2)
    prompt = [np.array([3, 50, 200, 9])]  # routes to 8 experts of a layer at most
    serving = Serving(engine="server", enforce_eager=True, max_model_len=64, moe_expert_cache_size=8)
    tokens, counted = {}, {}
    loaded = ServerGenerator(find_checkpoint(str(folder)), serving, tmp_path / "log")
    try:
        for size in (8, 12, None):
            loaded.generate(prompt, 4, lambda: None)
            loaded.resize_expert_cache(size)  # all slots are empty then
            loaded.reset_counters()
            (result,) = loaded.generate(prompt, 20, lambda: None)
            tokens[size], counted[size] = result.ids.tolist(), loaded.expert_cache()
        memory = loaded.memory()
    finally:
        loaded.close()

    assert tokens[8] == tokens[12] == tokens[None]
    assert [cache.size for cache in counted.values()] == [8, 12, 16]
    for cache in counted.values():
        assert (cache.experts, cache.policy, cache.store, len(cache.layers)) == (16, "lru", "pinned", 2)
        assert [layer.steps for layer in cache.layers] == [20, 20]
        assert cache.bytes_moved == cache.misses * cache.expert_bytes
        assert cache.overflow_steps == 0
    asked = {cache.hits + cache.misses for cache in counted.values()}
    assert len(asked) == 1  # the same tokens ask for the same experts
    assert counted[8].misses > counted[12].misses >= counted[None].misses > 0
    assert memory.kv_cache_bytes > 0
    assert "on GPUs only" in memory.absent["allocator"]
    assert loaded.facts.engaged["moe_expert_cache_size"] == 8


@needs_vllm
def test_a_server_that_would_not_load_the_plugin_is_not_started(tmp_path, monkeypatch):
    folder = write_tiny_moe(tmp_path / "moe", int4=True)
    checkpoint, cached = find_checkpoint(str(folder)), Serving(engine="server", moe_expert_cache_size=4)
    monkeypatch.setenv("VLLM_PLUGINS", "others")
    with pytest.raises(UsageError, match="VLLM_PLUGINS=others leaves hlwq_expert_cache out"):
        ServerGenerator(checkpoint, cached, tmp_path / "log")
    monkeypatch.setattr("evalsuite.engines.vllm_server.entry_points", lambda group: ())
    with pytest.raises(UsageError, match="installed packages only"):
        ServerGenerator(checkpoint, cached, tmp_path / "log")
    assert not (tmp_path / "log").exists()


class Dying(ServerGenerator):
    """Starts a program that ends, instead of a server."""

    says = ""

    def _start(self, url, serving):
        with self._log.open("ab") as output:
            program = f"print({self.says!r}); raise SystemExit(3)"
            return subprocess.Popen([sys.executable, "-c", program], stdout=output, start_new_session=True)


@needs_vllm
@pytest.mark.parametrize(
    ("says", "kind", "cause"),
    [
        (
            "ValueError: No available memory for the cache blocks. Try increasing",
            OutOfMemory,
            "leave no room",
        ),
        ("ValueError: Model architectures ['Foo'] are not supported for now.", ModelError, "does not know"),
        ("Segmentation fault", EngineDied, "unknown"),
    ],
)
def test_a_server_that_dies_while_loading_says_why(tmp_path, says, kind, cause):
    folder = tiny.write(qwen3_moe(), tmp_path / "moe")
    Dying.says = says
    with pytest.raises(kind, match="ended while it loaded") as caught:
        Dying(find_checkpoint(str(folder)), Serving(), tmp_path / "log")
    assert cause in caught.value.cause
    assert "Exit code 3; its last lines:" in caught.value.cause
    assert says in caught.value.cause
    assert str(tmp_path / "log") in caught.value.todo


def test_a_server_killed_in_the_middle(tmp_path):
    """Its requests fail with what ended it, and do not wait for ever."""
    script = Script([(0.05, [[1]]), (0.5, [[2]]), (0.0, [[3]])], dies_after=2)
    root = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    with serving(script) as url:
        loaded = ServerGenerator(find_checkpoint("demo"), Serving(server_url=url), tmp_path / "log")
        loaded._server = root  # as if it had been started here
        threading.Timer(0.2, root.kill).start()
        with pytest.raises(EngineDied, match="died") as caught:
            loaded.generate([np.arange(3)], 3, lambda: None)
        loaded.close()
    assert "Exit code -9" in caught.value.cause
