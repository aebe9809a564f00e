"""Watching: the grid of times by a scripted clock, phases, files on disk, and processes that die."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pynvml
import pytest

from evalsuite.core.errors import StorageError
from evalsuite.telemetry import gpu, watch
from evalsuite.telemetry.sampler import Sampler
from evalsuite.telemetry.samples import LINES, PARQUET, SampleFile, load_samples
from evalsuite.telemetry.watch import Watch
from telemetry.nvml import FakeNvml

ROOT = Path(__file__).resolve().parents[2]
SLEEP = [sys.executable, "-c", "import sys; sys.stdin.read()"]


class Script:
    """A clock that moves when somebody waits, and by how much a reading costs."""

    def __init__(self, ticks: int, cost_s: float = 0.0, late: dict[int, float] | None = None) -> None:
        self.now, self.left, self.cost_s, self.late = 100.0, ticks, cost_s, late or {}
        self.waits = 0
        self.reasons: dict[str, str] = {}

    def clock(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.now += seconds + self.late.get(self.waits, 0.0)
        self.waits += 1
        self.left -= 1
        return self.left < 0

    def read(self) -> dict[str, float]:
        self.now += self.cost_s
        return {"x": self.now}

    def close(self) -> None:
        pass

    def sampler(self, period_s: float = 0.1, share: float = 0.1) -> tuple[Sampler, list[float]]:
        times: list[float] = []
        return Sampler(
            [self], period_s, share, lambda t, _: times.append(round(t - 100, 6)), self.clock
        ), times


class TestGrid:
    def test_on_time(self):
        script = Script(5)
        sampler, times = script.sampler()
        sampler.run(script.wait)
        assert times == [0.1, 0.2, 0.3, 0.4, 0.5]
        assert (sampler.missing, sampler.gaps()) == (0, None)

    def test_a_little_late_keeps_the_grid(self):
        script = Script(4, late={1: 0.06})
        sampler, times = script.sampler()
        sampler.run(script.wait)
        assert times == [0.1, 0.26, 0.3, 0.4]
        assert sampler.missing == 0

    def test_missing_samples_are_counted_and_said(self):
        script = Script(4, late={1: 0.35})
        sampler, times = script.sampler()
        sampler.run(script.wait)
        assert times == [0.1, 0.55, 0.6, 0.7]
        assert sampler.missing == 3
        assert (
            sampler.gaps()
            == "3 of 7 samples are missing, and no sample was taken for 0.45 s, in which a peak can hide"
        )

    def test_one_long_gap_in_a_long_run_is_said(self):
        script = Script(1000, late={500: 1.25})
        sampler, _ = script.sampler()
        sampler.run(script.wait)
        assert sampler.missing == 12
        assert "no sample was taken for 1.35 s" in (sampler.gaps() or "")

    def test_a_short_gap_in_a_long_run_is_not(self):
        script = Script(1000, late={500: 0.35})
        sampler, _ = script.sampler()
        sampler.run(script.wait)
        assert sampler.missing == 3
        assert sampler.gaps() is None

    def test_a_costly_reading_lowers_the_rate_by_design(self):
        script = Script(6, cost_s=0.05)
        sampler, times = script.sampler(share=0.1)
        sampler.run(script.wait)
        gaps = [b - a for a, b in pairwise(times)]
        assert gaps[0] < 0.2  # the first reading of all is no measure
        assert all(gap == pytest.approx(0.5) for gap in gaps[2:])
        assert sampler.missing == 0
        assert sampler.spent_s == pytest.approx(0.3)

    def test_one_interrupted_reading_slows_nothing_down(self):
        script = Script(6)
        sampler, times = script.sampler()
        costs = iter([0.0, 0.0, 0.09, 0.0, 0.0, 0.0])
        script.read = lambda: setattr(script, "now", script.now + next(costs)) or {"x": 1.0}
        sampler.run(script.wait)
        assert times == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]

    def test_a_wake_brings_the_next_sample_forward(self):
        script = Script(2)
        sampler, times = script.sampler(period_s=1.0)
        waits = iter([0.4, 1.0, 1.0])

        def wait(seconds: float) -> bool:
            script.now += min(seconds, next(waits))
            script.left -= 1
            return script.left < 0

        sampler.run(wait)
        assert times == [0.4, 1.4]


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(SLEEP, stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def test_phases_and_the_table_on_disk(tmp_path: Path, child: subprocess.Popen[bytes]):
    weights = tmp_path / "weights"
    weights.write_bytes(b"1" * 100_000)
    with Watch(tmp_path, child.pid, files={"checkpoint": [weights]}, hz=50) as seen:
        seen.phase("load")
        time.sleep(0.1)
        seen.phase("decode")
        time.sleep(0.1)
        seen.end_phase()
    telemetry = seen.summary()
    assert [phase.name for phase in telemetry.phases] == ["load", "decode"]
    load, decode = telemetry.phases
    assert load.stop_s == decode.start_s
    assert 0.1 <= decode.stop_s - decode.start_s < 5
    samples = load_samples(tmp_path)
    assert not (tmp_path / LINES).exists()
    assert samples["t_s"].is_monotonic_increasing
    assert set(samples["phase"].dropna()) == {"load", "decode"}
    for series in telemetry.series:
        column = samples[series.name].dropna()
        assert (series.samples, series.minimum, series.maximum) == (len(column), column.min(), column.max())
        assert series.mean == pytest.approx(column.mean())
    named = {series.name for series in telemetry.series}
    assert {"rss_bytes", "pss_bytes", "disk_read_bytes", "page_cache_checkpoint_bytes"} <= named
    assert telemetry.sampled == "from outside"
    assert telemetry.rss_peak_bytes == samples["rss_bytes"].max()
    assert (telemetry.gpu_process_peak_bytes, "gpu" in telemetry.absent) == (None, True)


def test_a_phase_shorter_than_the_grid_has_a_sample(tmp_path: Path, child: subprocess.Popen[bytes]):
    with Watch(tmp_path, child.pid, hz=0.1) as seen:
        for name in ("prefill", "decode"):
            seen.phase(name)
        seen.end_phase()
    samples = load_samples(tmp_path)
    for phase in seen.summary().phases:
        inside = samples["t_s"].between(phase.start_s, phase.stop_s)
        assert samples.loc[inside, "rss_bytes"].notna().any()


def test_watching_oneself_is_said(tmp_path: Path):
    with Watch(tmp_path, os.getpid()) as seen:
        pass
    assert seen.summary().sampled == "in process"


def test_the_measured_process_is_killed(tmp_path: Path, child: subprocess.Popen[bytes]):
    with Watch(tmp_path, child.pid, hz=50) as seen:
        seen.phase("load")
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        time.sleep(0.2)
    samples = load_samples(tmp_path)
    assert samples["rss_bytes"].notna().any()
    assert samples["rss_bytes"].isna().iloc[-1]
    assert len(samples) > samples["rss_bytes"].notna().sum() + 3  # the watch goes on


def test_a_process_that_nobody_saw(tmp_path: Path, child: subprocess.Popen[bytes]):
    child.kill()
    child.wait()
    with Watch(tmp_path, child.pid) as seen:
        pass
    telemetry = seen.summary()
    assert telemetry.rss_peak_bytes is None
    assert "ended before" in telemetry.absent["rss_bytes"]


def test_a_gpu_that_is_lost_in_the_middle(
    tmp_path: Path, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
):
    nvml = FakeNvml()
    monkeypatch.setattr(gpu, "pynvml", nvml)
    with Watch(tmp_path, child.pid, gpus=[0], hz=50) as seen:
        nvml.processes[0] = {child.pid: 3 << 30}
        seen.phase("load")
        nvml.errors |= {"memory": pynvml.NVML_ERROR_GPU_IS_LOST, "processes": pynvml.NVML_ERROR_GPU_IS_LOST}
        seen.phase("decode")
        time.sleep(0.1)
    telemetry = seen.summary()
    series = {s.name: s for s in telemetry.series}
    assert telemetry.gpu_process_peak_bytes == 3 << 30
    assert (series["gpu0_used_bytes"].valid, series["gpu0_process_bytes"].valid) == (False, False)
    assert "GPU is lost" in (series["gpu0_used_bytes"].reason or "")
    assert "lost" not in (series["gpu0_power_w"].reason or "")  # a busy machine may miss a sample
    assert series["rss_bytes"].valid or "missing" in (series["rss_bytes"].reason or "")
    assert nvml.opened == 0


KILLED = """
import os, sys, time
from pathlib import Path
from evalsuite.telemetry.watch import Watch
with Watch(Path(sys.argv[1]), os.getpid(), hz=20) as seen:
    seen.phase("load")
    print("watching", flush=True)
    time.sleep(60)
"""


def test_a_killed_driver_loses_a_second_at_most(tmp_path: Path):
    driver = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert driver.stdout is not None
    assert driver.stdout.readline() == b"watching\n"
    time.sleep(2.5)
    driver.kill()
    driver.wait()
    driver.stdout.close()
    samples = load_samples(tmp_path)
    assert not (tmp_path / PARQUET).exists()
    assert samples["t_s"].iloc[-1] > 1.0
    assert len(samples) > 10


def test_a_torn_last_line_is_left_out(tmp_path: Path):
    (tmp_path / LINES).write_text(
        '{"t_s": 1.0, "phase": "load", "x": 2}\n{"t_s": 0.5, "phase": null}\n{"t_s": 2'
    )
    samples = load_samples(tmp_path)
    assert samples["t_s"].tolist() == [0.5, 1.0]
    assert samples["x"].isna().tolist() == [True, False]


@pytest.mark.parametrize("name", [PARQUET, LINES])
def test_damaged_samples_are_an_error_that_teaches(tmp_path: Path, name: str):
    with pytest.raises(StorageError, match="cannot be read"):
        load_samples(tmp_path)
    (tmp_path / name).write_bytes(b"{broken\n")
    with pytest.raises(StorageError, match="cannot be read"):
        load_samples(tmp_path)


def test_a_full_disk_ends_the_file_and_not_the_run(tmp_path: Path, child: subprocess.Popen[bytes]):
    class Full(SampleFile):
        def append(self, row: watch.Row) -> None:
            self.failure = "No space left on device"

    patch = pytest.MonkeyPatch()
    patch.setattr(watch, "SampleFile", Full)
    with Watch(tmp_path, child.pid) as seen:
        pass
    patch.undo()
    telemetry = seen.summary()
    assert telemetry.absent[PARQUET] == "No space left on device"
    assert telemetry.rss_peak_bytes is not None


def test_a_probe_that_breaks_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    readings = iter([{}])
    monkeypatch.setattr(watch.DiskProbe, "read", lambda _: next(readings))
    with pytest.raises((RuntimeError, StopIteration)), Watch(tmp_path, os.getpid(), hz=50) as seen:
        seen.phase("load")
        time.sleep(1.5)


def test_summaries_are_json(tmp_path: Path, child: subprocess.Popen[bytes]):
    with Watch(tmp_path, child.pid) as seen:
        pass
    json.dumps(seen.summary().model_dump(mode="json"), allow_nan=False)
