"""`vllm serve` with an expert cache: flags, streams to 16 clients at once, metrics, and a clean end."""

import concurrent.futures
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil
import pytest
from vllm_cpu.present import ENVIRONMENT, needs_vllm
from vllm_cpu.tiny_moe import write_tiny_moe

CLIENTS, TOKENS = 16, 16
START_S = 300

pytestmark = [pytest.mark.slow, needs_vllm]


def test_sixteen_clients_and_a_clean_end(tmp_path, demo_folder):
    model = write_tiny_moe(tmp_path / "model", int4=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_folder / name, model / name)
    scratch = Path(tempfile.mkdtemp(prefix="serve-"))  # its sockets' names have room for 107 characters
    port = free_port()
    command = [
        str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--port", str(port), "--dtype", "bfloat16",
        "--max-model-len", "128", "--max-num-seqs", "16", "--moe-expert-cache-size", "5",
        "--moe-expert-cache-policy", "lfru", "--moe-expert-store", "disk",
    ]  # fmt: skip
    environment = os.environ | ENVIRONMENT
    for name in ("VLLM_PLUGINS", "VLLM_ENABLE_V1_MULTIPROCESSING"):  # as users have it
        environment.pop(name, None)
    environment |= {"TMPDIR": str(scratch), "HLWQ_EVAL_CACHE": str(tmp_path / "experts")}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, server, tmp_path / "log")
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            answers = list(pool.map(lambda i: stream(url, model, i % 4), range(CLIENTS)))
        hits: list[str] = []
        deadline = time.monotonic() + 30
        while len(hits) < 2 and time.monotonic() < deadline:
            time.sleep(1.1)  # the worker leaves its counters once a second, after a step
            stream(url, model, 0)
            metrics = httpx.get(f"{url}/metrics").text.splitlines()
            hits = [line for line in metrics if line.startswith("hlwq_expert_cache_hits_total{")]
        children = psutil.Process(server.pid).children(recursive=True)
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
    assert code in (0, -signal.SIGTERM), (tmp_path / "log").read_text()[-3000:]
    # streamed; a server that waits for a core sends what has gathered in one piece
    assert any(len(pieces) > 2 for pieces in answers), [len(pieces) for pieces in answers]
    assert all(sum(map(len, pieces)) == TOKENS for pieces in answers)
    assert len(hits) == 2
    assert all(float(line.split()[-1]) > 0 for line in hits)
    assert "Expert cache, 5 of 16 experts in 2 layers, lfru, disk: hit rate" in (tmp_path / "log").read_text()
    assert not psutil.wait_procs(children, timeout=20)[1]
    assert not [path.name for path in scratch.iterdir() if "hlwq" in path.name]
    assert [path.suffix for path in (tmp_path / "experts").iterdir()] == [".experts"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until_ready(url, server, log):
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-5000:]
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-5000:])


def stream(url, model, seed):
    """The token ids of each piece of one streamed completion."""
    body = {
        "model": str(model), "prompt": [(11 * i + seed) % 256 for i in range(12)], "max_tokens": TOKENS,
        "temperature": 0, "ignore_eos": True, "stream": True, "return_token_ids": True,
    }  # fmt: skip
    pieces = []
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: {"):
                pieces += [choice["token_ids"] for choice in json.loads(line[6:])["choices"]]
    return [piece for piece in pieces if piece]
