"""What a run took from its machine. A reading that could not be had is absent with a reason, never zero."""

from typing import Literal

from pydantic import Field

from evalsuite.core.value import Value


class Series(Value):
    """One sampled quantity over a run; the samples themselves lie in ``telemetry.parquet``.

    Attributes:
        name: column of the file, its unit in its name.
        minimum, mean, maximum, last: over all samples; of a counter, `last` − `minimum` is what the run used.
        valid: every sample is there, and nothing foreign took part.
        reason: why it is not valid.
    """

    name: str
    samples: int
    minimum: float
    mean: float
    maximum: float
    last: float
    valid: bool = True
    reason: str | None = None


class Phase(Value):
    """A named stretch of a run, in seconds since sampling began: load, idle, prefill, decode."""

    name: str
    start_s: float
    stop_s: float


class EngineMemory(Value):
    """Memory as the engine itself reports it, in bytes on all its devices together.

    Attributes:
        weights_bytes: parameters and buffers, expert slots included.
        kv_cache_bytes: reserved for keys, values and recurrent states.
        allocated_peak_bytes, reserved_peak_bytes: of the framework's allocator.
    """

    weights_bytes: int | None = None
    kv_cache_bytes: int | None = None
    allocated_peak_bytes: int | None = None
    reserved_peak_bytes: int | None = None
    absent: dict[str, str] = Field(default={})


class Telemetry(Value):
    """Peaks of a run; what cannot be read here is None with a reason under `absent`.

    Attributes:
        rss_peak_bytes: resident set of the measured process and its children; None where it ended before it
            could be read.
        gpu_device_used_bytes: of the whole device at the end, as NVML reports it.
        gpu_process_peak_bytes: of the measured process tree, as NVML reports it.
        engine: what the engine says of its own memory.
        sampled: whether the samples were taken by another process than the measured one; None where there
            are none.
        neighbours: who used the GPUs at the same time, a phrase a GPU; of a perplexity, who did at its end.
            Empty where nobody did, or NVML does not tell whose a process is.
        phases, series: of runs that were sampled.
    """

    rss_peak_bytes: int | None
    gpu_allocated_peak_bytes: int | None = None
    gpu_reserved_peak_bytes: int | None = None
    gpu_device_used_bytes: int | None = None
    gpu_process_peak_bytes: int | None = None
    engine: EngineMemory | None = None
    sampled: Literal["from outside", "in process"] | None = None
    neighbours: tuple[str, ...] = ()
    phases: tuple[Phase, ...] = ()
    series: tuple[Series, ...] = ()
    absent: dict[str, str] = Field(default={})

    def warnings(self) -> tuple[str, ...]:
        """What a reader of the run's times must know."""
        return tuple(f"{who}: times and memory are not those of an idle GPU" for who in self.neighbours)
