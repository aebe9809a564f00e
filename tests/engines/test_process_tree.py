"""The end of a tree of processes."""

import signal
import subprocess
import sys

import psutil

from evalsuite.engines.process_tree import stop_tree
from evalsuite.telemetry.process import runs

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
    assert [process for process in tree if runs(process)] == []
    assert root.returncode == -signal.SIGTERM
    root.stdout.close()
