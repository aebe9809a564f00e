"""GPU memory between two engines: as it was before the first, or the next record says that it was not."""

import time
from collections.abc import Iterable

from evalsuite.core.units import si_bytes
from evalsuite.telemetry.probes import gpu_device_used_bytes

SLACK_BYTES = 64 * 2**20  # drivers keep a little for a while
PATIENCE_S, PAUSE_S = 20.0, 0.25


class IdleMemory:
    """Memory in use on these GPUs when nothing of ours runs.

    Args:
        gpus: NVML indices.
    """

    def __init__(self, gpus: Iterable[int]) -> None:
        self._idle = {gpu: gpu_device_used_bytes(gpu) for gpu in set(gpus)}

    def wait(self, gpus: Iterable[int]) -> tuple[str, ...]:
        """Return once the GPUs are idle again; else, after a while, a warning for each that is not."""
        end = time.monotonic() + PATIENCE_S
        return tuple(filter(None, (self._wait(gpu, end) for gpu in gpus)))

    def _wait(self, gpu: int, end: float) -> str:
        while (excess := gpu_device_used_bytes(gpu) - self._idle[gpu]) > SLACK_BYTES:
            if time.monotonic() > end:
                return (
                    f"GPU {gpu} held {si_bytes(excess)} more when this engine started than before the sweep"
                )
            time.sleep(PAUSE_S)
        return ""
