"""Peaks and amounts of each phase, from the samples.

- A peak is the largest sample between the phase's ends, one sample at its very end included.
- The page cache is what is resident at the end of the phase: it is lent, and taken back at any time.
- Bytes read and written and energy are counters: their value at the end of the phase less that at its
  beginning.

Units: bytes, joule, seconds. VRAM of the device counts every process on it; of the process tree, only what
the driver puts down to it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evalsuite.core.telemetry import Phase


@dataclass(frozen=True)
class PhaseFootprint:
    """One phase; None where nothing was read in it."""

    name: str
    seconds: float
    gpu_used_peak_bytes: float | None
    gpu_process_peak_bytes: float | None
    rss_peak_bytes: float | None
    pss_peak_bytes: float | None
    page_cache_bytes: float | None
    disk_read_bytes: float | None
    disk_written_bytes: float | None
    gpu_energy_j: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def by_phase(samples: pd.DataFrame, phases: Sequence[Phase]) -> list[PhaseFootprint]:
    """Peaks and amounts of each phase.

    Args:
        samples: as `evalsuite.telemetry.samples.load_samples` gives them.
    """
    samples = samples.assign(
        gpu_used_bytes=over_gpus(samples, "used_bytes"),
        gpu_energy_j=over_gpus(samples, "energy_j"),
        page_cache_bytes=total(samples, [c for c in samples.columns if c.startswith("page_cache_")]),
    )
    return [
        PhaseFootprint(
            name=phase.name,
            seconds=phase.stop_s - phase.start_s,
            gpu_used_peak_bytes=_peak(samples, "gpu_used_bytes", phase),
            gpu_process_peak_bytes=_peak(samples, "gpu_process_bytes", phase),
            rss_peak_bytes=_peak(samples, "rss_bytes", phase),
            pss_peak_bytes=_peak(samples, "pss_bytes", phase),
            page_cache_bytes=_last(samples, "page_cache_bytes", phase.start_s, phase.stop_s),
            disk_read_bytes=_grown(samples, "disk_read_bytes", phase),
            disk_written_bytes=_grown(samples, "disk_written_bytes", phase),
            gpu_energy_j=_grown(samples, "gpu_energy_j", phase),
        )
        for phase in phases
    ]


def over_gpus(samples: pd.DataFrame, name: str) -> pd.Series:
    """A quantity summed over the GPUs; null where one of them has no sample."""
    found = [c for c in samples.columns if c.startswith("gpu") and c.partition("_")[2] == name]
    return total(samples, [c for c in found if c.partition("_")[0] != "gpu"])


def total(samples: pd.DataFrame, columns: Sequence[str]) -> pd.Series:
    """The sum of columns, null where one of them is, or where there are none."""
    if not columns:
        return pd.Series(np.nan, samples.index)
    return samples[list(columns)].sum(axis=1, skipna=False)


def _peak(samples: pd.DataFrame, column: str, phase: Phase) -> float | None:
    values = _values(samples, column, phase.start_s, phase.stop_s)
    return float(values.max()) if len(values) else None


def _last(samples: pd.DataFrame, column: str, start_s: float, stop_s: float) -> float | None:
    values = _values(samples, column, start_s, stop_s)
    return float(values[-1]) if len(values) else None


def _grown(samples: pd.DataFrame, column: str, phase: Phase) -> float | None:
    before = _last(samples, column, -np.inf, phase.start_s)
    after = _last(samples, column, -np.inf, phase.stop_s)
    return None if before is None or after is None else after - before


def _values(samples: pd.DataFrame, column: str, start_s: float, stop_s: float) -> NDArray[np.float64]:
    if column not in samples:
        return np.empty(0)
    inside = samples["t_s"].between(start_s, stop_s)
    return samples.loc[inside, column].dropna().to_numpy(np.float64)
