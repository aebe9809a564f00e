"""A driver that answers as it is told, in place of pynvml."""

# ruff: noqa: N802 (the names are pynvml's)

from types import SimpleNamespace
from typing import Any

import pynvml


class FakeNvml:
    """One GPU or several; what a test changes between two readings changes the answer.

    Attributes:
        used: bytes in use on each device.
        processes: device to {pid: bytes, or None where the driver does not tell}.
        errors: name of a function to the code of the error that it raises.
    """

    def __init__(self, gpus: int = 1) -> None:
        self.used = [2 << 20] * gpus
        self.processes: list[dict[int, int | None]] = [{} for _ in range(gpus)]
        self.errors: dict[str, int] = {}
        self.throttle = 0
        self.opened = 0

    def __getattr__(self, name: str) -> Any:
        """Constants and error types are the real ones."""
        return getattr(pynvml, name)

    def _answer(self, name: str, value: Any) -> Any:
        if name in self.errors:
            raise pynvml.NVMLError(self.errors[name])
        return value

    def nvmlInit(self) -> None:
        self._answer("nvmlInit", None)
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.used)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index >= len(self.used):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int) -> Any:
        assert version == pynvml.nvmlMemory_v2
        return self._answer("memory", SimpleNamespace(used=self.used[handle]))

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> Any:
        listed = self.processes[handle].items()
        return self._answer("processes", [SimpleNamespace(pid=p, usedGpuMemory=m) for p, m in listed])

    def nvmlDeviceGetUtilizationRates(self, _handle: int) -> Any:
        return self._answer("utilisation", SimpleNamespace(gpu=90, memory=40))

    def nvmlDeviceGetPowerUsage(self, _handle: int) -> int:
        return self._answer("power", 350_500)

    def nvmlDeviceGetTotalEnergyConsumption(self, _handle: int) -> int:
        return self._answer("energy", 1_234_000)

    def nvmlDeviceGetClockInfo(self, _handle: int, domain: int) -> int:
        return self._answer("clock", {pynvml.NVML_CLOCK_SM: 1980, pynvml.NVML_CLOCK_MEM: 2619}[domain])

    def nvmlDeviceGetTemperature(self, _handle: int, sensor: int) -> int:
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return self._answer("temperature", 41)

    def nvmlDeviceGetCurrentClocksEventReasons(self, _handle: int) -> int:
        return self._answer("throttle", self.throttle)
