"""vLLM's routing, recorded in a child process: what vLLM prints, loads and sets there stays there."""

import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evalsuite.core.errors import EngineDied, UsageError
from evalsuite.core.spec import Dtype, Serving
from evalsuite.data.models import Checkpoint
from evalsuite.engines.routing import RoutedPass
from evalsuite.engines.vllm_arguments import (
    engine_arguments,
    engine_environment,
    engine_fields,
    require_vllm,
)
from evalsuite.engines.vllm_hooks import serve

IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # hooks and the list they fill are in one process
GRACE_S = 20.0
LOG_LINES = 12


class VllmRouting:
    """A `RoutingRecorder` over vLLM's offline engine, one request at a time."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: Dtype,
        load_format: Literal["auto", "dummy"],
        tokens: int,
        concurrency: int,
        trust_remote_code: bool,
        log: Path,
    ) -> None:
        """Start the engine.

        Args:
            tokens: of a prompt and its output.
            log: what the engine prints is appended to it.

        Raises:
            UsageError: more than one request at a time, a vLLM that cannot serve the model, or one whose
                routers have no hook.
            MeasurementError: the engine did not start, or died.
        """
        if concurrency > 1:
            raise UsageError(
                "vLLM decides by itself which requests share a pass, so it traces one request at a time.",
                todo="leave --concurrency out, or use --engine torch.",
            )
        serving = Serving(
            engine="vllm", dtype=dtype, load_format=load_format, enforce_eager=True, max_model_len=tokens,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        arguments = engine_arguments(checkpoint, serving) | {
            "max_num_seqs": 1, "max_num_batched_tokens": max(tokens, 512), "disable_log_stats": True,
        }  # fmt: skip
        if "async_scheduling" in engine_fields():
            arguments["async_scheduling"] = False  # it would run a pass more than it needs
        self._log = log
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._connection: Connection = ours
        self._child = context.Process(
            target=serve,
            args=(theirs, arguments, engine_environment(serving) | IN_PROCESS, log),
            daemon=True,
        )
        self._child.start()
        theirs.close()
        self.name = f"vllm {require_vllm()}"
        try:
            self.computed, self.layers = self._answer()
        except BaseException:
            self.close()
            raise

    def record(self, prompts: Sequence[NDArray[np.int64]], output_len: int, first: int) -> list[RoutedPass]:
        (prompt,) = prompts
        self._connection.send((prompt, output_len))
        passes: list[NDArray[np.int64]] = self._answer()
        starts = np.cumsum([0, *(len(chosen) for chosen in passes[:-1])])
        return [
            RoutedPass(
                request=np.full(len(chosen), first),
                position=start + np.arange(len(chosen)),
                prefill=index == 0,
                chosen=chosen,
            )
            for index, (chosen, start) in enumerate(zip(passes, starts, strict=True))
        ]

    def _answer(self) -> Any:
        try:
            fine, value = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
            raise EngineDied(
                "vLLM's process ended.",
                cause="\n".join(["the last lines of its log:", *lines[-LOG_LINES:]]),
                todo=f"read {self._log}.",
            ) from error
        if not fine:
            raise value
        return value

    def close(self) -> None:
        """Let the child end by itself, and end it where it does not."""
        self._connection.close()
        self._child.join(GRACE_S)
        if self._child.is_alive():
            self._child.kill()
            self._child.join()
