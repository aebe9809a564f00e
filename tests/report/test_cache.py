"""Tables and pictures of an expert cache: numbers by hand, and every derived one marked."""

import numpy as np
import pytest
from experts.traces import geometry, trace
from matplotlib.image import imread

from evalsuite.experts.gpus import GPUS
from evalsuite.experts.predict import Measured, predict, uniform_routing
from evalsuite.experts.simulation import Simulator
from evalsuite.report.cache import GpuRow, gpu_table, hit_rate_table, layer_table, trace_table
from evalsuite.report.cache_plots import SpeedCurve, expert_use, hit_rates, predicted_speeds


@pytest.fixture(scope="module")
def simulated():
    return Simulator(trace()).run(["lru", "belady"], [2, 16])


def rows_of(table):
    return [dict(zip((c.heading for c in table.columns), row, strict=True)) for row in table.cells()]


def test_trace_table_names_what_was_traced():
    shown = dict(trace_table(trace()).cells())
    assert shown["tokens: prefill, decode"] == "15, 9"
    assert shown["steps: prefill, decode"] == "3, 9"
    assert shown["experts a layer, chosen by a token"] == "16, 3"
    assert dict(trace_table(trace(dummy=True)).cells())["weights"] == "random (dummy)"


def test_hit_rates_are_those_of_the_counters(simulated):
    table = hit_rate_table(simulated)
    assert [row[:2] for row in table.cells()] == [
        ["2 of 16", "lru"], ["2 of 16", "belady"], ["16 of 16 (all)", "lru"], ["16 of 16 (all)", "belady"],
    ]  # fmt: skip
    for row in table.cells():
        cell = simulated.cell(row[1], int(row[0].split()[0]), "decode")
        assert row[2] == f"{100 * cell.counters.hit_rate:.1f}"
        assert row[3] == f"{cell.counters.misses / 9:.2f}"
        assert row[4] == f"{cell.counters.misses * 1000 / 9:.0f} B" or row[4].endswith("kB")
        assert row[5] == f"{cell.counters.overflow_steps} of 18"
    assert "knows the future" in table.caption
    assert "knows the future" not in hit_rate_table(Simulator(trace()).run(["lru"], [2])).caption


def test_layers_add_up(simulated):
    table = layer_table(simulated, "lru")
    assert [row[0] for row in table.cells()] == ["0", "1"]
    counters = simulated.cell("lru", 2, "decode").counters
    assert [row[1] for row in table.cells()] == [
        f"{100 * layer.hits / (layer.hits + layer.misses):.1f}" for layer in counters.layers
    ]


def test_random_weights_are_named_wherever_numbers_follow_from_them():
    found = Simulator(trace(dummy=True)).run(["lru"], [2])
    for table in (hit_rate_table(found), layer_table(found, "lru")):
        assert "random weights" in table.caption


def gpu_rows(sizes, memory_model):
    return [
        GpuRow(
            GPUS["rtx-4090"], size == 2,
            [predict(memory_model, GPUS["rtx-4090"], size, uniform_routing(16), 10, Measured())],
        )
        for size in sizes
    ]  # fmt: skip


def test_every_number_that_is_not_on_a_data_sheet_is_marked_derived():
    huge = geometry(expert_bytes=5_000_000_000)
    table = gpu_table(gpu_rows([1, 2, 16], huge), huge, "huge", 10, Measured(), trace().facts)
    shown = rows_of(table)
    assert [row["experts on the device"] for row in shown] == [
        "1 of 16",
        "2 of 16, the most that fit",
        "all 16",
    ]
    assert shown[2]["tok/s at most, uniform ↑"] == "does not fit"
    for row in table.grid():
        assert all(cell.origin == "derived" for cell in row[3:])
    assert all(heading.endswith(" (derived)") for heading in table.headings()[3:])
    assert "Derived, not measured" in table.caption
    assert "Ada GPU Architecture" in table.caption
    assert "data sheet's memory bandwidth" in table.caption


def test_what_was_measured_is_named_and_another_models_trace_too():
    sizes = geometry(experts=32)
    measured = Measured(compute_s=0.005, transfer_bytes_per_s=45e9)
    caption = gpu_table(gpu_rows([1], sizes), sizes, "other", 10, measured, trace(dummy=True).facts).caption
    assert "5 ms as measured" in caption
    assert "45 GB/s as measured" in caption
    assert "same share of its 16, which is an assumption" in caption
    assert "random weights" in caption


def test_pictures_are_drawn(tmp_path):
    curve = {1: 0.1, 4: 0.4, 16: 0.9}
    policies = dict.fromkeys(("lru", "lfu", "fifo", "slru", "lfru", "belady"), curve)
    drawn = [
        hit_rates(policies, 16, 3, "title $x_1", "caption", tmp_path / "rates"),
        predicted_speeds(
            [SpeedCurve(f"gpu {i}", [1, 4], [10.0, 20.0 + i]) for i in range(9)],
            16,
            3,
            "t",
            "c",
            tmp_path / "speeds",
        ),
        expert_use(np.arange(32).reshape(2, 16), (3, 7), "t", "c", tmp_path / "use"),
        expert_use(np.zeros((1, 8), np.int64), (0,), "t", "c", tmp_path / "unused"),
    ]
    for png, svg in drawn:
        assert imread(png).std() > 0
        assert svg.read_text().startswith("<?xml")
