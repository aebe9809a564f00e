"""A generator in a process of its own: what it does to its process, it does not do to the caller.

The caller's half. The other half is engines/worker.py, which runs in a new session with the engine inside;
messages go over a private socket, so whatever the engine prints lands in its log and nowhere else. The
engine ends with the caller, however that ends: politely, by Ctrl-C, or by SIGKILL, when the socket closes.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from evalsuite.core.cache import CacheCounters
from evalsuite.core.errors import EngineDied, EvalError, OutOfMemory, TimedOut
from evalsuite.core.record import ModelFacts
from evalsuite.core.spec import Serving
from evalsuite.core.speed import LoadTimes
from evalsuite.core.telemetry import EngineMemory
from evalsuite.engines.base import Generated
from evalsuite.engines.process_tree import members, send

MARK = "HLWQ_EVAL_ENGINE_MARK"  # in the environment of every process that belongs to one engine
POLITE_S, GRACE_S = 20.0, 10.0
LOG_LINES = 12


class ProcessGenerator:
    """The Generator protocol by messages to a child process.

    Args:
        model: as `evalsuite.data.models.find_checkpoint` takes it.
        serving: `gpus` become the child's only visible devices, which it numbers from 0.
        log: standard output and error of the child are appended to it.
        load_timeout_s: for `start`.

    Attributes:
        pid: of the child, from construction on; it is also the id of its session.
        deadline_s: on the monotonic clock; a call that is not answered by then raises TimedOut. None waits.
    """

    def __init__(self, model: str, serving: Serving, log: Path, load_timeout_s: float) -> None:
        self._model, self._serving, self._log = model, serving, log
        self._load_timeout_s = load_timeout_s
        self._facts: ModelFacts | None = None
        self._load: LoadTimes | None = None
        self._mark = secrets.token_hex(8)
        self._killed, self._closed, self._busy = False, False, False
        self.deadline_s: float | None = None
        ours, theirs = socket.socketpair()
        with theirs, log.open("ab") as output:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "evalsuite.engines.worker", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=device_environment(serving.gpus) | {MARK: self._mark},
            )
        self._connection = Connection(ours.detach())
        self.pid = self._child.pid

    def start(self) -> None:
        """Load the model; on return it is ready.

        Raises:
            TimedOut: it took longer than `load_timeout_s`.
            EngineDied: the process ended.
            EvalError: whatever the engine raised.
        """
        self.deadline_s = time.monotonic() + self._load_timeout_s
        visible = self._serving.model_copy(update={"gpus": tuple(range(len(self._serving.gpus)))})
        self._facts, self._load = self._call("load", self._model, visible, self._log)
        self.deadline_s = None

    @property
    def facts(self) -> ModelFacts:
        assert self._facts is not None, "start() comes first"
        return self._facts

    @property
    def load(self) -> LoadTimes:
        assert self._load is not None, "start() comes first"
        return self._load

    def generate(
        self, prompts: Sequence[NDArray[np.int64]], output_len: int, on_first_token: Callable[[], None]
    ) -> list[Generated]:
        """As the protocol has it."""
        return self._call("generate", list(prompts), output_len, on_event=on_first_token)

    def resize_expert_cache(self, size: int | None) -> None:
        self._call("resize_expert_cache", size)

    def reset_counters(self) -> None:
        self._call("reset_counters")

    def expert_cache(self) -> CacheCounters | None:
        return self._call("expert_cache")

    def memory(self) -> EngineMemory:
        return self._call("memory")

    def _call(self, name: str, *arguments: Any, on_event: Callable[[], None] | None = None) -> Any:
        self._busy = True
        try:
            self._connection.send((name, arguments))
            while True:
                kind, value = self._receive(name)
                if kind == "event" and on_event is not None:
                    on_event()
                elif kind == "error":
                    self._busy = False
                    raise value
                elif kind == "done":
                    self._busy = False
                    return value
        except (EOFError, ConnectionError) as error:
            raise self._death(name) from error

    def _receive(self, name: str) -> tuple[str, Any]:
        left = None if self.deadline_s is None else max(0.0, self.deadline_s - time.monotonic())
        if not self._connection.poll(left):
            action = "load" if name == "load" else "answer"
            raise TimedOut(
                f"{self._model} did not {action} in time.",
                cause=self._last_lines(),
                todo="give it more time, or ask for less.",
            )
        return self._connection.recv()

    def _death(self, during: str) -> EvalError:
        """What ended the child, which has closed its end."""
        try:
            code = self._child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            code = None  # it hangs while it ends; close() sees to it
        if code == -signal.SIGKILL and not self._killed:
            return OutOfMemory(
                f"The engine of {self._model} was killed from outside during {during}.",
                cause="as a rule by the kernel, because the machine had no memory left.",
                todo="give the machine more memory, or load a smaller model.",
            )
        how = "hung" if code is None else f"ended by {signal.Signals(-code).name}" if code < 0 else "ended"
        return EngineDied(
            f"The engine of {self._model} {how} during {during}.",
            cause=self._last_lines(),
            todo=f"read {self._log.name} beside the record.",
        )

    def _last_lines(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        said = [line.rstrip() for line in lines if line.strip()][-LOG_LINES:]
        return "the last lines of its log:\n" + "\n".join(said) if said else "it printed nothing."

    def kill(self) -> None:
        """End all its processes at once, from any thread; a call that waits raises EngineDied."""
        if not self._closed:
            self._killed = True
            send(self._members(), signal.SIGKILL)

    def close(self) -> None:
        """End the child and all that it started: by request, by SIGTERM, by SIGKILL."""
        if self._closed:
            return
        self._closed = True
        try:
            if not self._busy and not self._killed:
                self._ask_to_close()
            self._killed = True
            for sign, wait_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
                if living := self._members():
                    send(living, sign)
                    psutil.wait_procs(living, wait_s)
        finally:
            # a second Ctrl-C gets here too: nothing may stay behind
            send(self._members(), signal.SIGKILL)
            self._connection.close()
            self._child.wait()

    def _ask_to_close(self) -> None:
        with suppress(EOFError, ConnectionError, subprocess.TimeoutExpired):
            self._connection.send(("close", ()))
            self._child.wait(POLITE_S)

    def _members(self) -> list[psutil.Process]:
        return members(self.pid, (MARK, self._mark))


def device_environment(gpus: Sequence[int]) -> dict[str, str]:
    """This environment, with these devices the only visible ones; they count as the driver counts them."""
    environment = dict(os.environ)
    if gpus:
        inherited = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        names = [inherited[gpu] if gpu < len(inherited) else str(gpu) for gpu in gpus]
        environment |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(names)}
    return environment
