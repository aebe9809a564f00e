"""An engine in a child process: answers, failures and ends, by a scripted engine."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from evalsuite.core.errors import EngineDied, MeasurementError, OutOfMemory, TimedOut, UsageError
from evalsuite.core.spec import Serving
from evalsuite.engines.base import Generated
from evalsuite.engines.process import ProcessGenerator, device_environment

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [np.arange(5), np.arange(3)]


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def wait_until(condition, limit_s=20):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it never came to pass"
        time.sleep(0.02)


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """A ProcessGenerator with this script, closed in the end, whatever happened."""
    monkeypatch.setenv("HLWQ_EVAL_FAKE_ENGINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    engines = []

    def open_(load_timeout_s=60, start=True, serving=None, **script):
        path = tmp_path / f"script{len(engines)}.json"
        path.write_text(json.dumps(script))
        engine = ProcessGenerator(
            f"fake:{path}", serving or Serving(), tmp_path / "engine.log", load_timeout_s
        )
        engines.append(engine)
        if start:
            engine.start()
        return engine

    yield open_
    for engine in engines:
        engine.close()
        assert gone(engine.pid)
        assert engine._members() == []


def test_answers_and_events(opened):
    engine = opened()
    assert engine.facts.engaged == {"engine": "fake"}
    assert engine.load.total_s >= 0
    events = []
    before = time.monotonic()
    first, second = engine.generate(PROMPTS, 4, lambda: events.append(time.monotonic()))
    after = time.monotonic()
    assert isinstance(first, Generated)
    assert first.ids.tolist() == [10, 11, 12, 13]
    assert second.ids.tolist() == [3, 4, 5, 6]
    assert len(events) == 1
    # one clock for both processes
    assert before < first.submitted_s < first.token_s[0] < first.token_s[-1] < after
    assert first.token_s[0] <= events[0] < after
    assert engine.expert_cache() is None
    engine.resize_expert_cache(8)
    assert engine.expert_cache().size == 8
    assert engine.memory().absent


def test_its_pid_is_known_before_it_loads_and_leads_a_session(opened):
    engine = opened(start=False)
    assert os.getsid(engine.pid) == engine.pid != os.getsid(0)
    engine.start()


def test_what_it_prints_goes_to_the_log_and_not_into_the_messages(opened, tmp_path, capfd):
    engine = opened(on={"load": ["say", "garbage \x00 on stdout"]})
    engine.generate(PROMPTS, 2, lambda: None)
    assert b"garbage \x00 on stdout" in (tmp_path / "engine.log").read_bytes()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("action", "error"), [("oom", OutOfMemory), ("fail", MeasurementError), ("refuse", UsageError)]
)
def test_errors_arrive_as_they_were_raised_and_the_engine_lives_on(opened, action, error):
    engine = opened(on={"generate 1": [action]})
    with pytest.raises(error) as caught:
        engine.generate(PROMPTS, 2, lambda: None)
    assert type(caught.value) is error
    if action == "oom":
        assert (caught.value.what, caught.value.cause, caught.value.todo) == (
            "The script is out of memory.", "it says so.", "change it.",
        )  # fmt: skip
    assert len(engine.generate(PROMPTS, 2, lambda: None)) == 2


def test_a_crash_shows_the_last_lines_of_the_log(opened):
    engine = opened(on={"generate": ["crash"]})
    with pytest.raises(EngineDied, match="during generate") as caught:
        engine.generate(PROMPTS, 2, lambda: None)
    assert "RuntimeError: the script crashes" in caught.value.cause


def test_a_kill_from_outside_is_out_of_memory(opened):
    engine = opened(on={"generate": ["die"]})
    with pytest.raises(OutOfMemory, match="killed from outside"):
        engine.generate(PROMPTS, 2, lambda: None)
    with pytest.raises(OutOfMemory):
        engine.memory()


def test_a_call_past_its_deadline_times_out_and_close_does_not_wait(opened):
    engine = opened(on={"generate": ["hang"]})
    engine.deadline_s = time.monotonic() + 0.3
    with pytest.raises(TimedOut):
        engine.generate(PROMPTS, 2, lambda: None)
    before = time.monotonic()
    engine.close()
    assert time.monotonic() - before < 8  # SIGTERM ends a sleeping script at once
    assert gone(engine.pid)


def test_loading_has_a_limit(opened):
    with pytest.raises(TimedOut, match="did not load in time"):
        opened(load_timeout_s=1.5, on={"load": ["hang"]})


def test_killed_by_the_caller_is_no_lack_of_memory(opened):
    engine = opened()
    engine.kill()
    with pytest.raises(EngineDied, match="SIGKILL"):
        engine.generate(PROMPTS, 2, lambda: None)


def test_only_the_gpus_asked_for_are_visible(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "CUDA_VISIBLE_DEVICES" not in device_environment(())
    assert device_environment((1, 0))["CUDA_VISIBLE_DEVICES"] == "1,0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert device_environment((1,))["CUDA_VISIBLE_DEVICES"] == "6"
    assert device_environment((1,))["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


DRIVER = """
import sys, time
from pathlib import Path
import numpy as np
from evalsuite.core.spec import Serving
from evalsuite.engines.process import ProcessGenerator, device_environment
engine = ProcessGenerator(sys.argv[1], Serving(), Path(sys.argv[2]), 60)
print(engine.pid, flush=True)
try:
    engine.start()
    print("ready", flush=True)
    engine.generate([np.arange(3)], 10_000_000, lambda: print("generating", flush=True))
finally:
    engine.close()
"""


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_the_caller(tmp_path, sign):
    script = tmp_path / "script.json"
    script.write_text("{}")
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, f"fake:{script}", str(tmp_path / "engine.log")],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=os.environ | {"HLWQ_EVAL_FAKE_ENGINE": "1", "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    with driver:
        pid = int(driver.stdout.readline())
        assert driver.stdout.readline() == "ready\n"
        assert driver.stdout.readline() == "generating\n"
        driver.send_signal(sign)
        driver.wait(20)
    wait_until(lambda: gone(pid))


def test_no_fake_engine_unless_the_environment_asks_for_one(opened, monkeypatch):
    monkeypatch.delenv("HLWQ_EVAL_FAKE_ENGINE")
    with pytest.raises(UsageError, match="is no model"):
        opened()
