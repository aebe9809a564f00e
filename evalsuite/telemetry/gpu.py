"""GPUs as their driver sees them (NVML), read from outside of the measured process.

Columns of GPU n, each named ``gpuN_…``:

- ``used_bytes``: of the device, by all processes, without what the driver keeps for itself.
- ``process_bytes``: of the measured process tree. In containers and virtual machines NVML often lists no
  process, or by numbers of another PID namespace: then the column is absent, with that reason.
- ``utilisation_percent``, ``memory_utilisation_percent``: share of the driver's last sampling period in which
  a kernel ran, or device memory was read or written.
- ``power_w``, ``energy_j`` (a counter), ``sm_clock_mhz``, ``memory_clock_mhz``, ``temperature_c``.
- ``power_capped``, ``thermal_slowdown``, ``hardware_slowdown``: 1 while the driver gives it as a reason for
  lower clocks, else 0; the mean is the share of time.

``gpu_process_bytes`` is the sum of ``process_bytes`` over the GPUs.

NVML: https://docs.nvidia.com/deploy/nvml-api/
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import pynvml

from evalsuite.core.errors import first_line
from evalsuite.telemetry.process import ProcessTree

# without a process an H100 shows a few MB in use, and the smallest CUDA context takes some hundreds
IDLE_BYTES = 64 << 20
Reading = Callable[[Any], dict[str, float]]


def visible_gpus(wanted: Sequence[int], count: int) -> tuple[int, ...]:
    """NVML indices of the GPUs that an engine will use.

    Both ways of counting begin at the first device that CUDA_VISIBLE_DEVICES leaves visible; what it names
    other than by index is left out.

    Args:
        wanted: indices among the visible GPUs; empty takes the first `count`.

    Returns:
        Empty where there is no driver and none is asked for.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return tuple(wanted)
    try:
        visible = list(range(pynvml.nvmlDeviceGetCount()))
    finally:
        pynvml.nvmlShutdown()
    listed = _listed()
    if listed is not None:
        visible = [int(name) for name in listed if name.isdigit()]
    if not wanted:
        return tuple(visible[:count])
    return tuple(visible[gpu] if gpu < len(visible) else gpu for gpu in wanted)


def count_visible(count: int) -> int:
    """How many of a machine's `count` GPUs CUDA_VISIBLE_DEVICES leaves visible, named by index or not."""
    listed = _listed()
    return count if listed is None else min(count, len(listed))


def _listed() -> list[str] | None:
    """Names in CUDA_VISIBLE_DEVICES; None where it is not set. A -1 hides what comes after it."""
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    return [name for name in names[: names.index("-1") if "-1" in names else None] if name]


def neighbours(gpus: Sequence[int]) -> tuple[str, ...]:
    """Who uses GPUs at this moment beside this process and its children, as `GpuProbe.neighbours`.

    Args:
        gpus: NVML indices.
    """
    probe = GpuProbe(gpus, ProcessTree(os.getpid()))
    try:
        probe.read()
        return probe.neighbours
    finally:
        probe.close()


class GpuProbe:
    """Every GPU in use, from before the measured process begins to use it.

    Args:
        gpus: NVML indices.
        tree: the measured processes; every other process on these GPUs is foreign.
    """

    def __init__(self, gpus: Sequence[int], tree: ProcessTree) -> None:
        self._tree = tree
        self._reasons: dict[str, str] = {}
        self._devices: list[_Device] = []
        self._open = False
        if not gpus:
            self._reasons["gpu"] = "no GPU takes part"
        try:
            pynvml.nvmlInit()
            self._open = True
        except pynvml.NVMLError as error:
            self._reasons["gpu"] = f"no NVIDIA driver answers ({first_line(error)})"
            return
        for index in gpus:
            try:
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            except pynvml.NVMLError as error:
                self._reasons[f"gpu{index}"] = first_line(error)
                continue
            self._devices.append(_Device(index, handle, tree))

    @property
    def reasons(self) -> dict[str, str]:
        found = dict(self._reasons)
        for device in self._devices:
            found |= device.explain()
        if self._devices and (one := found.get(f"gpu{self._devices[0].index}_process_bytes")):
            found["gpu_process_bytes"] = one
        return found

    @property
    def neighbours(self) -> tuple[str, ...]:
        """Who used the GPUs while a process of the tree did, a phrase a GPU.

        Nothing of a GPU where NVML lists none of ours: its processes may then be ours by other numbers.
        """
        return tuple(f"GPU {d.index}: {who}" for d in self._devices if (who := d.beside()))

    def read(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for device in self._devices:
            values |= device.read()
        by_process = [values.get(f"gpu{device.index}_process_bytes") for device in self._devices]
        told = [value for value in by_process if value is not None]
        if told and len(told) == len(by_process):
            values["gpu_process_bytes"] = sum(told)
        return values

    def close(self) -> None:
        if self._open:
            pynvml.nvmlShutdown()
            self._open = False


class _Device:
    """One GPU: its readings, what failed, and who else used it."""

    def __init__(self, index: int, handle: Any, tree: ProcessTree) -> None:
        self.index, self._handle, self._tree = index, handle, tree
        self._never: dict[str, str] = {}  # first column of a reading → why it is not asked for again
        self._failed: dict[str, str] = {}
        self._columns: set[str] = set()
        self._matched = False
        self._strangers: set[int] = set()
        self._foreign = ""
        self._unlisted = "NVML lists no process of the measured tree, as is usual in containers"
        self._readings: dict[str, Reading] = {
            "used_bytes": _used, "utilisation_percent": _utilisation, "power_w": _power, "energy_j": _energy,
            "sm_clock_mhz": _sm_clock, "memory_clock_mhz": _memory_clock, "temperature_c": _temperature,
            "power_capped": _slowdowns,
        }  # fmt: skip
        self._look_for_guests()

    def _look_for_guests(self) -> None:
        """Who uses the device before the measured process does."""
        try:
            listed = {p.pid for p in pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)}
            used = _used(self._handle)["used_bytes"]
        except pynvml.NVMLError:
            return  # the readings will say why
        ours = self._tree.pids(refresh=True)
        if listed & ours:
            return
        if listed:
            self._foreign = f"{_processes(len(listed))} used the GPU before the run began"
        elif used > IDLE_BYTES:
            self._foreign = f"{used / 1e9:.2f} GB of the GPU were in use before the run began"

    def read(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for name, reading in self._readings.items():
            if name in self._never:
                continue
            try:
                values |= reading(self._handle)
            except pynvml.NVMLError as error:
                (self._never if _for_good(error) else self._failed)[name] = first_line(error)
        try:
            values |= self._process_bytes()
        except pynvml.NVMLError as error:
            self._failed["process_bytes"] = first_line(error)
        self._columns |= values.keys()
        return {f"gpu{self.index}_{name}": value for name, value in values.items()}

    def _process_bytes(self) -> dict[str, float]:
        """Nothing before NVML has named a process of the tree: 0 would be a guess."""
        listed = {p.pid: p.usedGpuMemory for p in pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)}
        ours = self._tree.pids()
        if not listed.keys() <= ours:
            ours = self._tree.pids(refresh=True)
        if listed.keys() & ours:
            self._matched = True
            self._strangers |= listed.keys() - ours
        if not self._matched:
            if listed:
                self._unlisted = "NVML names no process of the measured tree: its PID namespace is another"
            return {}
        mine = [used for pid, used in listed.items() if pid in ours]
        if None in mine:
            self._unlisted = "NVML does not tell memory by process here"
            return {}
        return {"process_bytes": sum(mine)}

    def beside(self) -> str:
        """See `GpuProbe.neighbours`."""
        strangers = self._strangers - self._tree.pids()
        return f"{_processes(len(strangers))} outside of the measured tree used the GPU" if strangers else ""

    def explain(self) -> dict[str, str]:
        """Column to the reason why it is absent or not to be trusted."""
        found: dict[str, str] = {}
        if foreign := self._foreign or self.beside():
            found |= dict.fromkeys(self._columns - {"process_bytes"}, foreign)
        found |= self._failed | self._never
        if "process_bytes" not in self._columns:
            found.setdefault("process_bytes", self._unlisted)
        return {f"gpu{self.index}_{name}": reason for name, reason in found.items()}


def _for_good(error: Any) -> bool:
    """Whether this driver or device will never tell (pynvml gives its errors a code, and no type for it)."""
    return error.value in (pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)


def _processes(count: int) -> str:
    return "another process" if count == 1 else f"{count} other processes"


def _used(handle: Any) -> dict[str, float]:
    memory: Any = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    return {"used_bytes": memory.used}


def _utilisation(handle: Any) -> dict[str, float]:
    rates: Any = pynvml.nvmlDeviceGetUtilizationRates(handle)
    return {"utilisation_percent": rates.gpu, "memory_utilisation_percent": rates.memory}


def _power(handle: Any) -> dict[str, float]:
    return {"power_w": pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3}


def _energy(handle: Any) -> dict[str, float]:
    return {"energy_j": pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3}


def _sm_clock(handle: Any) -> dict[str, float]:
    return {"sm_clock_mhz": float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))}


def _memory_clock(handle: Any) -> dict[str, float]:
    return {"memory_clock_mhz": float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM))}


def _temperature(handle: Any) -> dict[str, float]:
    return {"temperature_c": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)}


def _slowdowns(handle: Any) -> dict[str, float]:
    reasons = pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    thermal = pynvml.nvmlClocksEventReasonSwThermalSlowdown | pynvml.nvmlClocksEventReasonHwThermalSlowdown
    hardware = pynvml.nvmlClocksEventReasonHwSlowdown | pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown
    return {
        "power_capped": float(bool(reasons & pynvml.nvmlClocksEventReasonSwPowerCap)),
        "thermal_slowdown": float(bool(reasons & thermal)),
        "hardware_slowdown": float(bool(reasons & hardware)),
    }
