"""The real ``vllm serve``, on the CPU; and the end of a tree of processes."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest
import torch

from engines import tiny
from engines.scripted_server import Script, serving
from engines.test_vllm_offline import ENVIRONMENT, MISSING, logits_after, qwen3_moe
from evalsuite.core.errors import EngineDied, ModelError, OutOfMemory, UsageError
from evalsuite.core.spec import Serving
from evalsuite.data.models import find_checkpoint
from evalsuite.engines.vllm_server import ServerGenerator, stop_tree

needs_vllm = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def lives(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def living_in(session):
    living = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and lives(process):
                living.append(process)
        except (psutil.Error, ProcessLookupError):
            continue
    return living


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
        assert living_in(session)
        results = loaded.generate(prompts, 10, lambda: first.append(time.monotonic()))
        with pytest.raises(UsageError) as caught:
            loaded.generate(prompts[:1], 100, lambda: None)
        memory = loaded.memory()
    finally:
        loaded.close()
    assert living_in(session) == []

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


STUBBORN = """
import signal, subprocess, sys, time
if len(sys.argv) == 1:
    subprocess.Popen([sys.executable, __file__, "child"])
    subprocess.Popen([sys.executable, __file__, "child"], start_new_session=True)
else:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(60)
"""


def test_children_that_ignore_sigterm_or_leave_the_session_end_too(tmp_path):
    program = tmp_path / "stubborn.py"
    program.write_text(STUBBORN)
    root = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, start_new_session=True)
    for _ in range(3):
        assert root.stdout.readline() == b"ready\n"
    tree = [psutil.Process(root.pid), *psutil.Process(root.pid).children(recursive=True)]
    assert len(tree) == 3
    stop_tree(root, grace_s=0.5)
    assert [process for process in tree if lives(process)] == []
    assert root.returncode == -signal.SIGTERM
    root.stdout.close()


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
