"""Peaks and amounts of phases against samples written by hand."""

import numpy as np
import pandas as pd
import pytest

from evalsuite.core.telemetry import Phase
from evalsuite.telemetry.phases import by_phase, over_gpus

LOAD, DECODE, LATE = (
    Phase(name="load", start_s=0.0, stop_s=1.0),
    Phase(name="decode", start_s=1.0, stop_s=2.0),
    Phase(name="late", start_s=5.0, stop_s=6.0),
)
NONE = np.nan
SAMPLES = pd.DataFrame(
    {
        "t_s": [0.0, 0.5, 0.6, 1.0, 1.5, 1.9, 3.0],
        "rss_bytes": [10, 80, NONE, 60, 90, 70, 500],
        "pss_bytes": [NONE, NONE, 40, NONE, NONE, NONE, 400],
        "disk_read_bytes": [100, 150, NONE, 400, 410, 430, 9000],
        "page_cache_checkpoint_bytes": [NONE, NONE, 7, NONE, 30, NONE, 1],
        "page_cache_expert_files_bytes": [NONE, NONE, 1, NONE, 2, NONE, 1],
        "gpu0_used_bytes": [1, 2, NONE, 3, 4, 5, 99],
        "gpu1_used_bytes": [1, 2, NONE, 3, NONE, 1, 99],
        "gpu0_energy_j": [50, 60, NONE, 90, 95, 120, 500],
        "gpu1_energy_j": [0, 0, NONE, 10, 10, 20, 500],
    }
)


def test_peaks_lie_within_and_counters_are_differences():
    load, decode = by_phase(SAMPLES, [LOAD, DECODE])
    assert (load.name, load.seconds) == ("load", 1.0)
    assert (load.rss_peak_bytes, decode.rss_peak_bytes) == (80, 90)
    assert (load.pss_peak_bytes, decode.pss_peak_bytes) == (40, None)
    assert (load.disk_read_bytes, decode.disk_read_bytes) == (300, 30)
    assert (load.page_cache_bytes, decode.page_cache_bytes) == (8, 32)
    assert (load.gpu_used_peak_bytes, decode.gpu_used_peak_bytes) == (6, 6)
    assert (load.gpu_energy_j, decode.gpu_energy_j) == (50, 40)
    assert load.disk_written_bytes is None
    assert load.gpu_process_peak_bytes is None


def test_a_phase_without_samples_is_not_zero():
    (late,) = by_phase(SAMPLES, [LATE])
    assert (late.rss_peak_bytes, late.page_cache_bytes, late.gpu_used_peak_bytes) == (None, None, None)


def test_a_process_that_began_inside_the_phase_counts_from_its_first_sample():
    """There is no reading before the phase: what the counter held then is unknown."""
    born = SAMPLES.assign(disk_read_bytes=[NONE, 150, NONE, 400, 410, 430, 9000])
    load, decode = by_phase(born, [LOAD, DECODE])
    assert load.disk_read_bytes is None
    assert decode.disk_read_bytes == 30


def test_gpus_are_summed_only_where_all_have_a_sample():
    assert over_gpus(SAMPLES, "used_bytes").fillna(-1).tolist() == [2, 4, -1, 6, -1, 6, 198]
    assert over_gpus(SAMPLES, "power_w").isna().all()


def test_the_sum_over_processes_is_no_gpu():
    frame = pd.DataFrame({"t_s": [0.0], "gpu0_process_bytes": [3.0], "gpu_process_bytes": [3.0]})
    assert over_gpus(frame, "process_bytes").tolist() == [3]
    (load,) = by_phase(frame, [LOAD])
    assert load.gpu_process_peak_bytes == pytest.approx(3)
