"""The server engine: ``vllm serve`` measured as its clients see it (engines/vllm_client.py).

The server runs in a session of its own on a loopback port, and ends with everything that it started; or it
runs already, somewhere, and is left alone. With an expert cache it is started with vLLM's development
endpoints (``VLLM_SERVER_DEV_MODE``): its workers can then be asked for their counters, and for other sizes.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalsuite.core.cache import CacheCounters
from evalsuite.core.errors import EngineDied, EvalError, UsageError
from evalsuite.core.record import ModelFacts
from evalsuite.core.spec import Serving
from evalsuite.core.speed import LoadTimes
from evalsuite.core.telemetry import EngineMemory
from evalsuite.data.models import Checkpoint
from evalsuite.engines.base import Generated
from evalsuite.engines.process_tree import GRACE_S, stop_tree
from evalsuite.engines.select import refuse_settings
from evalsuite.engines.vllm_arguments import (
    built_for_cpu,
    caches_experts,
    engaged_arguments,
    engine_arguments,
    engine_environment,
    require_vllm,
)
from evalsuite.engines.vllm_client import CompletionsClient
from evalsuite.engines.vllm_facts import refuse_too_long, served_facts
from evalsuite.engines.vllm_failures import failure, last_lines
from evalsuite.engines.vllm_log import (
    LogText,
    computed_dtype,
    graphs_captured,
    kernel_names,
    kv_cache_bytes,
    load_times,
    weights_bytes,
)
from evalsuite.engines.vllm_reports import WorkerReports
from evalsuite.telemetry.gpu import visible_gpus
from evalsuite.telemetry.machine import read_machine

HOST = "127.0.0.1"
PLUGIN_GROUP = "vllm.general_plugins"
POLL_S = 0.25
ATTACHED = "a server that was running already does not tell"


class ServerGenerator:
    """A `Generator` over a vLLM server.

    Args:
        log: the server's output is appended to it.
        on_progress: told the last line of the log while the server loads.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        serving: Serving,
        log: Path,
        on_progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Start a server and wait until it answers, or attach to the one at `serving.server_url`.

        Raises:
            MissingDependency, ModelError: as `engine_arguments`; and known causes of failures.
            UsageError: so too; or the server at the URL serves another model, or cannot honour the request.
            OutOfMemory: it does not fit.
            EngineDied: the server ended, or nothing answers at the URL.
        """
        began = time.monotonic()
        self._checkpoint, self._log = checkpoint, log
        self._text = LogText(log)
        self._server: subprocess.Popen[bytes] | None = None
        self._arguments: dict[str, Any] = {}
        self._workers: WorkerReports | None = None
        self._cached = False
        if serving.server_url is None:
            self._arguments = engine_arguments(checkpoint, serving)
            self._cached = caches_experts(checkpoint.config(), self._arguments)
            if self._cached:
                _require_plugin()
            url = f"http://{HOST}:{_free_port()}"
        else:
            refuse_settings("server", serving)
            url = _base(serving.server_url)
        self._client = CompletionsClient(url, self._explain)
        try:
            if serving.server_url is None:
                self._server = self._start(url, serving)
                self._wait(on_progress)
            self._longest = self._client.choose(checkpoint).longest
            if self._cached:
                self._workers = WorkerReports(self._client, cached=True)
        except BaseException:
            self.close()
            raise
        if self._server is None:
            self.load = LoadTimes(total_s=None)
        else:
            self.load = load_times(self._text.read(), time.monotonic() - began)
        self.facts = self._read_facts(serving)

    def generate(
        self, prompts: Sequence[NDArray[np.int64]], output_len: int, on_first_token: Callable[[], None]
    ) -> list[Generated]:
        refuse_too_long(prompts, output_len, self._longest)  # the server would give fewer tokens
        return self._client.generate(prompts, output_len, on_first_token)

    def resize_expert_cache(self, size: int | None) -> None:
        if self._workers is None:
            raise UsageError(
                f"A server without an expert cache cannot have one (of {size}) without loading again.",
                todo="run one cell per size.",
            )
        self._workers.resize_expert_cache(size)

    def reset_counters(self) -> None:
        if self._workers is not None:
            self._workers.reset_counters()

    def expert_cache(self) -> CacheCounters | None:
        return self._workers.expert_cache() if self._workers is not None else None

    def memory(self) -> EngineMemory:
        if self._workers is not None:
            return self._workers.memory()
        if self._server is None:
            return EngineMemory(absent={"engine": ATTACHED})
        text = self._text.read()
        weights, cache = weights_bytes(text), kv_cache_bytes(text)
        absent = {"allocator": "a server does not tell its allocator's peaks"}
        absent |= {"weights": "its log does not say"} if weights is None else {}
        absent |= {"kv_cache": "its log does not say"} if cache is None else {}
        return EngineMemory(weights_bytes=weights, kv_cache_bytes=cache, absent=absent)

    def close(self) -> None:
        """Stop a server that was started here, and every process that it started; leave another alone."""
        self._client.close()
        if self._server is not None:
            stop_tree(self._server)

    def _start(self, url: str, serving: Serving) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *server_flags(self._arguments)]
        command += ["--served-model-name", self._checkpoint.name, "--host", HOST]
        command += ["--port", url.rpartition(":")[2]]
        development = {"VLLM_SERVER_DEV_MODE": "1"} if self._cached else {}
        with self._log.open("ab") as output:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | engine_environment(serving) | development,
            )

    def _wait(self, on_progress: Callable[[str], None]) -> None:
        said = ""
        while not self._client.healthy():
            if dead := self._death(f"The vLLM server of {self._checkpoint.name} ended while it loaded."):
                raise dead
            line = last_lines(self._text.read(), 1).strip()
            if line != said:
                on_progress(line)
                said = line
            time.sleep(POLL_S)

    def _death(self, what: str, wait_s: float = 0) -> EvalError | None:
        """Why the server that was started here is dead; None where it lives after so many seconds."""
        assert self._server is not None
        try:
            code = self._server.wait(wait_s)
        except subprocess.TimeoutExpired:
            return None
        text = self._text.read()
        error = failure(what, text, self._log)
        end = f"Exit code {code}; its last lines:\n{last_lines(text)}"
        return type(error)(error.what, cause=f"{error.cause}\n{end}", todo=error.todo)

    def _explain(self, what: str, heard: str) -> EvalError:
        """The error for a request that failed other than by being refused."""
        if self._server is None:
            return EngineDied(
                what, cause=heard, todo="check --server-url, and that the server is still running."
            )
        if dead := self._death(f"The vLLM server of {self._checkpoint.name} died.", GRACE_S):
            return dead
        return failure(f"{what} It said: {heard}", self._text.read(), self._log)

    def _read_facts(self, serving: Serving) -> ModelFacts:
        if self._server is None:
            return served_facts(
                self._checkpoint,
                serving,
                dtype="unknown",
                device="server",
                device_name=f"unknown: {ATTACHED}",
                engaged={
                    "vllm": self._version(),
                    "server": "attached",
                    "mode": "unknown",
                    "max_model_len": self._longest,
                },
                warnings=("measured through a server that was running already: its settings are not known",),
            )
        text = self._text.read()
        on_cpu, machine = built_for_cpu(), read_machine()
        index = next(iter(visible_gpus(serving.gpus, 1)), 0)
        engaged: dict[str, Any] = {
            "vllm": require_vllm(),
            "server": "started",
            "mode": "eager" if serving.enforce_eager else "compiled" if on_cpu else "graphs",
            "log_kernels": list(kernel_names(text)),
            "max_model_len": self._longest,
            "tensor_parallel_size": serving.tensor_parallel_size,
        }
        if not on_cpu:
            engaged["cudagraphs"] = graphs_captured(text)
        if serving.moe_expert_cache_size is not None:
            engaged["moe_expert_cache_size"] = serving.moe_expert_cache_size
        return served_facts(
            self._checkpoint,
            serving,
            dtype=computed_dtype(text) or serving.dtype,
            device="cpu" if on_cpu else "cuda:0",
            device_name=machine.cpu if on_cpu else machine.gpus[index].name,
            engaged=engaged | engaged_arguments(self._arguments),
        )

    def _version(self) -> str | None:
        with suppress(EvalError):
            return self._client.ask("GET", "/version").get("version")
        return None


def require_server(checkpoint: Checkpoint, url: str) -> None:
    """Ask a server that runs already for the model, before anything is measured there.

    Raises:
        UsageError: nothing answers, or it serves another model or is no vLLM server.
    """

    def explain(what: str, heard: str) -> EvalError:
        return UsageError(what, cause=heard, todo="check --server-url, and that the server is running.")

    client = CompletionsClient(_base(url), explain)
    try:
        client.choose(checkpoint)
    finally:
        client.close()


def _base(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1")


def _require_plugin() -> None:
    """A server loads plugins of installed packages, and of those the ones that VLLM_PLUGINS names.

    Raises:
        UsageError: it would not load this package's.
    """
    found = [entry.name for entry in entry_points(group=PLUGIN_GROUP) if entry.value.startswith("evalsuite.")]
    named = os.environ.get("VLLM_PLUGINS")
    if not found:
        raise UsageError(
            "The server would not know the expert cache: vLLM loads plugins of installed packages only.",
            todo="pip install hlwq-eval into this environment, or give --engine vllm.",
        )
    if named is not None and not set(found) & {name.strip() for name in named.split(",")}:
        raise UsageError(
            f"The server would not know the expert cache: VLLM_PLUGINS={named} leaves {found[0]} out.",
            todo=f"add {found[0]} to VLLM_PLUGINS, or unset it.",
        )


def server_flags(arguments: dict[str, Any]) -> list[str]:
    """Engine arguments as flags of ``vllm serve``, the model first."""
    flags = [str(arguments["model"])]
    for name, value in arguments.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "model":
            continue
        if name == "enable_prefix_caching":
            flags.append(flag if value else f"--no-{name.replace('_', '-')}")
        elif isinstance(value, bool):
            flags += [flag] if value else []
        else:
            flags += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
