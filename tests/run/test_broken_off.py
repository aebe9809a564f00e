"""A sweep that is killed or interrupted leaves no process, keeps what is finished, and goes on there."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

TESTS = Path(__file__).resolve().parents[1]


def start(folder):
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("sweep_driver.py")), str(folder)],
        env=os.environ | {"HLWQ_EVAL_FAKE_ENGINE": "1", "PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def finished(folder):
    return sorted(
        p.parent for p in folder.glob("results/demo/speed-*/run.json") if p.parent.suffix != ".partial"
    )


def engines(driver):
    """Engine processes of a sweep that runs."""
    children = psutil.Process(driver.pid).children(recursive=True)
    return [child for child in children if "evalsuite.engines.worker" in child.cmdline()]


def wait_until(condition, driver, limit_s=60):
    end = time.monotonic() + limit_s
    while not condition():
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < end, "it never came to pass"
        time.sleep(0.01)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_it_goes_on_at_the_first_unfinished_cell(tmp_path, sign):
    with start(tmp_path) as driver:
        wait_until(lambda: finished(tmp_path), driver)
        started = engines(driver)
        assert len(started) == 1
        # a terminal sends Ctrl-C to the whole foreground group, to which the engine does not belong
        (os.killpg if sign == signal.SIGINT else os.kill)(driver.pid, sign)
        out, err = driver.communicate(timeout=30)
    assert driver.returncode == -sign if sign == signal.SIGKILL else "KeyboardInterrupt" in err, (out, err)
    assert not psutil.wait_procs(started, timeout=20)[1], "an engine was left behind"
    kept = finished(tmp_path)
    records = {path: (path / "run.json").read_bytes() for path in kept}
    assert 1 <= len(kept) < 3
    partial = list(tmp_path.glob("results/demo/*.partial"))
    assert len(partial) == 1
    if sign == signal.SIGINT:
        assert json.loads((partial[0] / "run.json").read_text())["status"] == "interrupted"
    with start(tmp_path) as driver:
        out, err = driver.communicate(timeout=60)
    assert out.endswith("['ok', 'ok', 'ok']\n"), err
    assert len(finished(tmp_path)) == 3
    assert {path: (path / "run.json").read_bytes() for path in kept} == records
    assert list(tmp_path.glob("results/demo/*.partial")) == []
