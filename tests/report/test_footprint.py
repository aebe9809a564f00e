"""Footprint tables and pictures: units, dashes with reasons, and panels that say why they are empty."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from evalsuite.core.record import Machine, Record
from evalsuite.core.speed import FootprintResult, LoadTimes
from evalsuite.core.telemetry import EngineMemory, Phase, Series, Telemetry
from evalsuite.report.footprint import gigabytes, memory_table, phase_table, vram_numbers
from evalsuite.report.footprint_plots import over_time, vram_bars, without_repeats
from evalsuite.report.plots import spread
from evalsuite.telemetry.phases import by_phase

PHASES = tuple(
    Phase(name=name, start_s=start, stop_s=stop)
    for name, start, stop in (("load", 0, 60), ("idle", 60, 62), ("prefill", 62, 62.3), ("decode", 62.3, 70))
)
TIMES = np.linspace(0, 70, 701)
RISING = np.minimum(TIMES / 50, 1)
ON_A_GPU = pd.DataFrame(
    {
        "t_s": TIMES,
        "gpu0_used_bytes": 71e9 * RISING,
        "gpu0_process_bytes": 70e9 * RISING,
        "gpu_process_bytes": 70e9 * RISING,
        "gpu0_energy_j": 300 * TIMES,
        "rss_bytes": 4e9 + 3e9 * RISING,
        "pss_bytes": np.where(np.arange(701) % 20 == 0, 3e9 + 3e9 * RISING, np.nan),
        "page_cache_checkpoint_bytes": 19.4e9 * RISING,
        "disk_read_bytes": 19.4e9 * RISING,
        "disk_written_bytes": 1e6 * RISING,
    }
)
NO_DRIVER = "no NVIDIA driver answers (NVML Shared Library Not Found)"


def record(telemetry: Telemetry, result: bool = True) -> Record:
    return Record(
        run_id="m/r", kind="footprint", status="ok" if result else "oom", started="", finished="",
        spec={"model": "some/model"}, spec_hash="0",
        machine=Machine(platform="Linux", cpu="x", cpu_cores=1, ram_bytes=1, python="3", packages={}),
        telemetry=telemetry,
        results=FootprintResult(
            checkpoint_bytes=19_400_000_000, disk_bytes={"checkpoint": 19_400_000_000},
            disk_absent={"hub_cache": "this machine has no hub cache"},
            load=LoadTimes(total_s=165.0, resident_share=0.0), input_len=512, output_len=128,
        ) if result else None,
    )  # fmt: skip


def on_a_gpu(**changes: object) -> Telemetry:
    return Telemetry(
        rss_peak_bytes=7_000_000_000, gpu_process_peak_bytes=70_000_000_000, phases=PHASES,
        engine=EngineMemory(
            weights_bytes=18_100_000_000, kv_cache_bytes=50_000_000_000, allocated_peak_bytes=69_000_000_000
        ),
    ).model_copy(update=changes)  # fmt: skip


def on_a_cpu() -> Telemetry:
    absent = {"gpu": NO_DRIVER}
    engine = EngineMemory(kv_cache_bytes=10**9, absent={"weights": "on GPUs only", "allocator": "GPUs only"})
    return Telemetry(rss_peak_bytes=7 * 10**9, engine=engine, phases=PHASES, absent=absent)


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "—"), (0, "0"), (71.4e9, "71.4"), (1.5e12, "1500"), (0.215e9, "0.215"), (2.49e6, "0.0025")],
)
def test_gigabytes_are_ten_to_the_nine(count: float | None, text: str):
    assert str(gigabytes(count)) == text


def test_a_phase_a_row_and_every_column_in_one_unit():
    table = phase_table(record(on_a_gpu()), by_phase(ON_A_GPU, PHASES))
    assert [row[0] for row in table.cells()] == ["load", "idle", "prefill", "decode"]
    load = dict(zip([c.title for c in table.columns], table.cells()[0], strict=True))
    assert (load["VRAM device"], load["VRAM tree"], load["disk reads"]) == ("71", "70", "19.4")
    assert load["GPU energy"] == "18,000"
    units = {c.title: c.unit for c in table.columns}
    assert set(units.values()) == {"", "s", "GB", "J"}
    assert "GiB" not in table.to_markdown()


def test_dashes_have_their_reason_in_the_caption():
    samples = ON_A_GPU.drop(columns=[c for c in ON_A_GPU.columns if c.startswith("gpu")])
    table = phase_table(record(on_a_cpu()), by_phase(samples, PHASES))
    assert "VRAM tree" not in [c.title for c in table.columns]
    assert {row[2] for row in table.cells()} == {"—"}
    assert NO_DRIVER in table.caption


def test_series_that_are_not_valid_are_named():
    bad = Series(
        name="gpu0_used_bytes", samples=3, minimum=1, mean=1, maximum=1, last=1, valid=False, reason="another process"
    )  # fmt: skip
    table = phase_table(record(on_a_gpu(series=(bad,))), by_phase(ON_A_GPU, PHASES))
    assert "Not valid: gpu0_used_bytes (another process)." in table.caption


def test_the_four_numbers():
    assert list(vram_numbers(record(on_a_gpu())).values()) == [18.1e9, 50e9, 69e9, 70e9]
    assert list(vram_numbers(record(on_a_cpu())).values()) == ["on GPUs only", 10**9, "GPUs only", NO_DRIVER]


def test_nvml_of_the_device_is_not_called_the_process():
    whole = Series(name="gpu0_used_bytes", samples=3, minimum=1, mean=1, maximum=71e9, last=1)
    numbers = vram_numbers(record(on_a_gpu(gpu_process_peak_bytes=None, series=(whole,))))
    assert numbers["NVML peak of the whole device"] == 71e9
    assert "NVML peak of the process tree" not in numbers


def test_the_memory_table_says_why_and_how_cold():
    rows = {row[0]: row[1:] for row in memory_table(record(on_a_cpu())).cells()}
    assert rows["weights, as the engine reports"] == ["—", "on GPUs only"]
    assert rows["checkpoint's weight files"] == ["19.4", "loaded in 2 min 45 s, 0 % in the page cache before"]
    assert rows["disk: hub cache, all models"] == ["—", "this machine has no hub cache"]


def test_a_run_whose_engine_died_has_tables_too():
    died = record(on_a_cpu().model_copy(update={"engine": None, "phases": PHASES[:1]}), result=False)
    assert len(phase_table(died, by_phase(ON_A_GPU, PHASES[:1])).cells()) == 1
    rows = {row[0]: row[1:] for row in memory_table(died).cells()}
    assert rows["weights, as the engine reports"] == ["—", "the engine did not get so far"]


def texts(path: Path) -> str:
    """The comments that matplotlib writes beside the outlines of a text."""
    return " ".join(re.findall(r"<!-- (.*?) -->", path.read_text()))


def test_pictures_name_phases_and_lines(tmp_path: Path):
    png, svg = over_time(ON_A_GPU, on_a_gpu(), "a_b$c: memory", "caption", tmp_path / "footprint")
    assert png.stat().st_size > 10_000
    for word in (
        "load",
        "idle",
        "prefill",
        "decode",
        "device",
        "process tree",
        "RSS",
        "PSS",
        "read",
        "a_b$c: memory",
    ):
        assert word in texts(svg)
    assert "absent" not in texts(svg)


def test_rounds_of_prefill_and_decode_are_one_band():
    names = [
        "load",
        "warm-up",
        "decode",
        "prefill",
        "decode",
        "prefill",
        "decode",
        "idle",
        "prefill",
        "decode",
    ]
    phases = [Phase(name=name, start_s=i, stop_s=i + 1) for i, name in enumerate(names)]
    found = [(phase.name, phase.start_s, phase.stop_s) for phase in without_repeats(phases)]
    assert found == [
        ("load", 0, 1), ("warm-up", 1, 2), ("prefill, decode, …", 2, 7), ("idle", 7, 8), ("prefill", 8, 9), ("decode", 9, 10),
    ]  # fmt: skip


def test_a_panel_without_a_gpu_says_why(tmp_path: Path):
    samples = ON_A_GPU.drop(columns=[c for c in ON_A_GPU.columns if c.startswith("gpu")])
    _, svg = over_time(samples, on_a_cpu(), "t", "c", tmp_path / "footprint")
    assert f"absent: {NO_DRIVER}" in texts(svg)
    numbers = vram_numbers(record(on_a_cpu()))
    _, svg = vram_bars(numbers, None, "t", "c", tmp_path / "vram")
    assert "absent: on GPUs only" in texts(svg)
    assert "absent: dummy weights come from no file" in texts(svg)
    assert "1 GB" in texts(svg)


def test_pictures_of_nothing(tmp_path: Path):
    samples = pd.DataFrame({"t_s": [0.0, 1.0], "phase": [None, None]})
    nothing = Telemetry(rss_peak_bytes=None, absent={"rss_bytes": "it ended", "gpu": "none"})
    over_time(samples, nothing, "t", "c", tmp_path / "footprint")
    vram_bars({"NVML peak": "none"}, None, "t", "c", tmp_path / "vram")


@pytest.mark.parametrize(
    ("places", "found"),
    [
        ([], []),
        ([0.1, 0.5, 0.9], [0.1, 0.5, 0.9]),
        ([0.3, 0.31, 0.32, 0.8], [0.3, 0.4, 0.5, 0.8]),
        ([0.4, 0.97, 0.98, 0.99], [0.4, 0.8, 0.9, 1.0]),
    ],
)
def test_names_are_moved_apart(places: list[float], found: list[float]):
    assert spread(places, 0.1) == pytest.approx(found)
