"""The processes of an engine: its session, and what has left it."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress

import psutil

from evalsuite.telemetry.process import runs

GRACE_S = 20.0  # from SIGTERM to SIGKILL
POLL_S = 0.025


def members(session: int, mark: tuple[str, str] | None = None) -> list[psutil.Process]:
    """Living processes of a session, descendants of its leader, and all whose environment has this mark."""
    found: dict[int, psutil.Process] = {}
    with suppress(psutil.NoSuchProcess):
        leader = psutil.Process(session)
        found = {process.pid: process for process in (leader, *leader.children(recursive=True))}
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == session or (mark and process.environ().get(mark[0]) == mark[1]):
                found[process.pid] = process
    return [process for process in found.values() if runs(process)]


def send(processes: Sequence[psutil.Process], sign: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(sign)


def stop_tree(root: subprocess.Popen[bytes], grace_s: float = GRACE_S) -> None:
    """End a process that leads a session, and all in it: by SIGTERM, and what is left by SIGKILL."""
    tree = members(root.pid)
    with suppress(ProcessLookupError):
        root.send_signal(signal.SIGTERM)
    try:
        _wait_for_end(tree, root, grace_s)
    finally:  # also after a second Ctrl-C
        tree += members(root.pid)
        send(tree, signal.SIGKILL)
        root.wait()
    _wait_for_end(tree, root, grace_s)


def _wait_for_end(processes: Sequence[psutil.Process], root: subprocess.Popen[bytes], limit_s: float) -> None:
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        root.poll()  # reaps it
        if not any(runs(process) for process in processes):
            return
        time.sleep(POLL_S)
