"""What NVML tells and does not tell, with the driver replaced at pynvml's own functions."""

import os

import pynvml
import pytest

from evalsuite.telemetry import gpu
from evalsuite.telemetry.gpu import GpuProbe, count_visible, neighbours, visible_gpus
from telemetry.nvml import FakeNvml

GIB = 1 << 30
OURS = frozenset({100, 101})


class Tree:
    """A process tree with these members; a child that is born is known after a refresh."""

    def __init__(self, pids: frozenset[int] = OURS, born: frozenset[int] = frozenset()) -> None:
        self._pids, self._born = pids, born

    def pids(self, *, refresh: bool = False) -> frozenset[int]:
        if refresh:
            self._pids |= self._born
        return self._pids


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml(2)
    monkeypatch.setattr(gpu, "pynvml", fake)
    return fake


def probe(*gpus: int, tree: Tree | None = None) -> GpuProbe:
    return GpuProbe(gpus or (0,), tree or Tree())  # pyright: ignore[reportArgumentType]


def test_everything_in_its_unit(nvml: FakeNvml):
    nvml.throttle = pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonGpuIdle
    watched = probe()
    nvml.processes[0] = {100: 3 * GIB, 101: GIB}
    nvml.used[0] = 5 * GIB
    assert watched.read() == {
        "gpu0_used_bytes": 5 * GIB,
        "gpu0_process_bytes": 4 * GIB,
        "gpu0_utilisation_percent": 90,
        "gpu0_memory_utilisation_percent": 40,
        "gpu0_power_w": 350.5,
        "gpu0_energy_j": 1234,
        "gpu0_sm_clock_mhz": 1980,
        "gpu0_memory_clock_mhz": 2619,
        "gpu0_temperature_c": 41,
        "gpu0_power_capped": 1,
        "gpu0_thermal_slowdown": 0,
        "gpu0_hardware_slowdown": 0,
        "gpu_process_bytes": 4 * GIB,
    }
    assert watched.reasons == {}
    watched.close()
    assert nvml.opened == 0


@pytest.mark.parametrize(
    ("bit", "column"),
    [
        (pynvml.nvmlClocksEventReasonSwThermalSlowdown, "thermal_slowdown"),
        (pynvml.nvmlClocksEventReasonHwThermalSlowdown, "thermal_slowdown"),
        (pynvml.nvmlClocksEventReasonHwSlowdown, "hardware_slowdown"),
        (pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown, "hardware_slowdown"),
        (pynvml.nvmlClocksEventReasonSwPowerCap, "power_capped"),
    ],
)
def test_why_clocks_are_lower(nvml: FakeNvml, bit: int, column: str):
    nvml.throttle = bit
    found = probe().read()
    raised = {c for c in ("thermal_slowdown", "hardware_slowdown", "power_capped") if found[f"gpu0_{c}"]}
    assert raised == {column}


def test_two_gpus_are_summed_only_where_both_tell(nvml: FakeNvml):
    watched = probe(0, 1)
    nvml.processes[0] = {100: GIB}
    assert "gpu_process_bytes" not in watched.read()
    nvml.processes[1] = {101: 2 * GIB}
    found = watched.read()
    assert (found["gpu1_process_bytes"], found["gpu_process_bytes"]) == (2 * GIB, 3 * GIB)


def test_no_driver(nvml: FakeNvml):
    nvml.errors["nvmlInit"] = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    watched = probe()
    assert watched.read() == {}
    assert list(watched.reasons) == ["gpu"]
    assert "Driver Not Loaded" in watched.reasons["gpu"]
    watched.close()
    assert nvml.opened == 0
    assert visible_gpus((), 1) == ()


def test_a_gpu_that_does_not_exist(nvml: FakeNvml):
    watched = probe(0, 7)
    assert "Invalid Argument" in watched.reasons["gpu7"]
    assert "gpu0_used_bytes" in watched.read()


class TestProcesses:
    def test_a_container_that_lists_none(self, nvml: FakeNvml):
        """The device's memory grows, and no process is listed: absent, and not 0."""
        watched = probe()
        nvml.used[0] = 5 * GIB
        found = watched.read()
        assert found["gpu0_used_bytes"] == 5 * GIB
        assert not {"gpu0_process_bytes", "gpu_process_bytes"} & found.keys()
        assert "lists no process" in watched.reasons["gpu_process_bytes"]
        assert set(watched.reasons) == {"gpu0_process_bytes", "gpu_process_bytes"}

    def test_numbers_of_another_namespace(self, nvml: FakeNvml):
        watched = probe()
        nvml.processes[0] = {4_000_000: 5 * GIB}
        assert "gpu0_process_bytes" not in watched.read()
        assert "PID namespace" in watched.reasons["gpu_process_bytes"]
        assert "gpu0_used_bytes" not in watched.reasons  # ours by all that is known

    def test_a_driver_that_does_not_tell_memory(self, nvml: FakeNvml):
        watched = probe()
        nvml.processes[0] = {100: None}
        assert "gpu0_process_bytes" not in watched.read()
        assert "does not tell memory" in watched.reasons["gpu0_process_bytes"]

    def test_memory_given_back_is_a_true_zero(self, nvml: FakeNvml):
        watched = probe()
        nvml.processes[0] = {100: GIB}
        watched.read()
        nvml.processes[0] = {}
        assert watched.read()["gpu_process_bytes"] == 0

    def test_a_child_just_born_is_ours(self, nvml: FakeNvml):
        watched = probe(tree=Tree(frozenset({100}), born=frozenset({102})))
        nvml.processes[0] = {100: GIB, 102: GIB}
        assert watched.read()["gpu_process_bytes"] == 2 * GIB
        assert watched.reasons == {}


class TestForeign:
    def spoiled(self, watched: GpuProbe) -> dict[str, str]:
        return {name: why for name, why in watched.reasons.items() if name.endswith("_used_bytes")}

    def test_a_process_that_was_there_before(self, nvml: FakeNvml):
        nvml.processes[0] = {55: GIB}
        watched = probe()
        nvml.processes[0] = {55: GIB, 100: GIB}
        assert watched.read()["gpu0_process_bytes"] == GIB
        assert self.spoiled(watched) == {
            "gpu0_used_bytes": "another process used the GPU before the run began"
        }
        assert "gpu0_process_bytes" not in watched.reasons  # ours is counted apart
        assert "gpu0_power_w" in watched.reasons

    def test_memory_that_was_taken_before(self, nvml: FakeNvml):
        nvml.used[0] = 3 * 10**9
        watched = probe()
        watched.read()
        assert "3.00 GB of the GPU were in use before" in self.spoiled(watched)["gpu0_used_bytes"]
        assert watched.neighbours == (), "it may be ours, of an engine that is kept, where NVML lists nobody"

    def test_an_engine_that_is_ending_is_no_neighbour_of_the_next(self, nvml: FakeNvml):
        watched = probe()
        nvml.processes[0] = {55: GIB}
        watched.read()
        nvml.processes[0] = {100: GIB}
        watched.read()
        assert watched.neighbours == ()

    def test_a_process_that_comes_later(self, nvml: FakeNvml):
        watched = probe(0, 1)
        nvml.processes = [{100: GIB}, {100: GIB}]
        watched.read()
        assert self.spoiled(watched) == {}
        nvml.processes[1] = {100: GIB, 55: GIB, 56: GIB}
        watched.read()
        nvml.processes[1] = {100: GIB}
        watched.read()
        (name,) = self.spoiled(watched)
        assert name == "gpu1_used_bytes"
        assert "2 other processes outside" in watched.reasons[name]
        assert watched.neighbours == ("GPU 1: 2 other processes outside of the measured tree used the GPU",)

    def test_at_this_moment(self, nvml: FakeNvml):
        nvml.processes = [{os.getpid(): GIB, 55: GIB}, {os.getpid(): GIB}]
        assert neighbours((0, 1)) == ("GPU 0: another process outside of the measured tree used the GPU",)
        nvml.processes[0] = {55: GIB, 56: GIB}
        assert neighbours((0, 1)) == (), "which of them is ours, nobody can tell"
        assert neighbours((7,)) == ()
        assert nvml.opened == 0

    def test_watching_begins_after_the_model_is_loaded(self, nvml: FakeNvml):
        nvml.used[0], nvml.processes[0] = 9 * GIB, {100: 8 * GIB}
        watched = probe()
        watched.read()
        assert watched.reasons == {}


class TestFailures:
    def test_what_the_device_never_tells_is_absent_and_asked_once(self, nvml: FakeNvml):
        nvml.errors["energy"] = pynvml.NVML_ERROR_NOT_SUPPORTED
        watched = probe()
        assert "gpu0_energy_j" not in watched.read()
        assert watched.reasons["gpu0_energy_j"] == "Not Supported"
        del nvml.errors["energy"]
        assert "gpu0_energy_j" not in watched.read()

    def test_a_device_that_is_lost_and_one_that_comes_back(self, nvml: FakeNvml):
        watched = probe()
        assert len(watched.read()) == 11
        for name in (
            "memory",
            "processes",
            "utilisation",
            "power",
            "energy",
            "clock",
            "temperature",
            "throttle",
        ):
            nvml.errors[name] = pynvml.NVML_ERROR_GPU_IS_LOST
        assert watched.read() == {}
        assert "GPU is lost" in watched.reasons["gpu0_used_bytes"]
        nvml.errors.clear()
        assert "gpu0_used_bytes" in watched.read()
        assert "GPU is lost" in watched.reasons["gpu0_used_bytes"]  # samples are missing all the same


@pytest.mark.parametrize(
    ("wanted", "count", "visible", "found"),
    [
        ((), 1, None, (0,)),
        ((), 2, None, (0, 1)),
        ((1,), 1, None, (1,)),
        ((), 1, "1", (1,)),
        ((0,), 1, "1,0", (1,)),
        ((), 1, "", ()),
        ((5,), 1, None, (5,)),
    ],
)
def test_which_gpus_an_engine_uses(
    nvml: FakeNvml,
    monkeypatch: pytest.MonkeyPatch,
    wanted: tuple[int, ...],
    count: int,
    visible: str | None,
    found: tuple[int, ...],
):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus(wanted, count) == found
    assert nvml.opened == 0


@pytest.mark.parametrize(
    ("visible", "found"), [(None, 4), ("", 0), ("-1", 0), ("2,3", 2), ("2,-1,3", 1), ("GPU-1a2b, 0", 2)]
)
def test_how_many_gpus_are_left_visible(monkeypatch: pytest.MonkeyPatch, visible: str | None, found: int):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count_visible(4) == found
