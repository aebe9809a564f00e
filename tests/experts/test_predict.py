"""Predictions against arithmetic done by hand, and data sheets against what they must satisfy."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalsuite.core.errors import UsageError
from evalsuite.data.models import find_checkpoint
from evalsuite.engines.geometry import read_geometry
from evalsuite.experts.gpus import GPUS, gpus_of
from evalsuite.experts.predict import (
    RESERVE_BYTES,
    Measured,
    Routing,
    device_bytes,
    largest_cache,
    predict,
    uniform_routing,
)
from experts.traces import geometry

KNOWN = Measured(compute_s=0.010, transfer_bytes_per_s=1e9)
HALF = Routing("half", lambda size: 0.5)


def test_a_measured_gpu_by_hand():
    """2 layers, top-4, half of them missed, 1 MB each: 4 MB over 1 GB/s is 4 ms beside 10 ms of compute."""
    sizes = geometry(experts=16, top_k=4, layers=2, expert_bytes=1_000_000)
    found = predict(sizes, GPUS["h100"], 8, HALF, 10, KNOWN)
    assert found.transfer_bytes_per_token == 4e6
    assert found.tokens_per_s == pytest.approx(1 / 0.014)
    assert found.device_bytes == 500 + 2 * 8 * 1_000_000 + 10 * 8 + 16 + RESERVE_BYTES


def test_without_measurements_the_data_sheet_bounds_it():
    sizes = geometry(experts=16, top_k=4, layers=2, expert_bytes=1_000_000)
    gpu = GPUS["rtx-4090"]
    found = predict(sizes, gpu, 8, HALF, 10, Measured())
    read = 400 + 4 * 2 * 1_000_000 + 4 + 10 * 8 + 2 * 16
    assert found.tokens_per_s == pytest.approx(1 / (read / 1008e9 + 4e6 / (16 * 16e9 / 8 * 128 / 130)))


@pytest.mark.parametrize("size", [16, 17, 1000])
def test_all_resident_moves_nothing_whatever_the_routing(size):
    found = predict(geometry(), GPUS["h100"], size, HALF, 10, KNOWN)
    assert (found.size, found.hit_rate, found.transfer_bytes_per_token) == (16, 1.0, 0)
    assert found.tokens_per_s == pytest.approx(100)


@given(memory=st.integers(RESERVE_BYTES, RESERVE_BYTES + 60_000), context=st.integers(1, 64))
def test_the_largest_cache_fits_and_one_more_does_not(memory, context):
    sizes = geometry(experts=16, layers=3)
    largest = largest_cache(sizes, memory, context)
    if largest is None:
        assert device_bytes(sizes, 1, context) > memory
        return
    assert device_bytes(sizes, largest, context) <= memory
    assert largest == 16 or device_bytes(sizes, largest + 1, context) > memory


@given(sizes=st.lists(st.integers(1, 256), min_size=2, max_size=5, unique=True).map(sorted))
def test_more_slots_are_never_slower_under_uniform_routing(sizes):
    model = geometry(experts=256, top_k=8, layers=4, expert_bytes=10_000)
    found = [predict(model, GPUS["a100"], n, uniform_routing(256), 8, Measured()) for n in sizes]
    speeds = [one.tokens_per_s for one in found]
    assert speeds == sorted(speeds)


def test_the_35b_at_no_hits_moves_the_519_mb_that_its_card_implies():
    folder = "experiments/geometry/qwen3.5-35b-a3b-int4"
    root = __file__.rsplit("/tests/", 1)[0]
    sizes = read_geometry(find_checkpoint(f"{root}/{folder}", weights=False), "bfloat16")
    found = predict(sizes, GPUS["h100"], 8, Routing("none", lambda size: 0.0), 4096, Measured())
    assert found.transfer_bytes_per_token / 1e6 == pytest.approx(519, abs=0.5)
    slots = [device_bytes(sizes, n, 1) - device_bytes(sizes, 0, 1) for n in (4, 8, 64, 128)]
    assert [round(n / 1e9, 2) for n in slots] == [0.26, 0.52, 4.15, 8.3]
    assert largest_cache(sizes, GPUS["rtx-4090"].memory_bytes, 4096) == 256


def test_data_sheets_are_named_once_and_have_a_source():
    assert [gpu.key for gpu in gpus_of(["h100", "rtx-4090", "h100"])] == ["h100", "rtx-4090"]
    for key, gpu in GPUS.items():
        assert key == gpu.key
        assert gpu.source.startswith("NVIDIA, ")
        assert 10e9 < gpu.link_bytes_per_s < gpu.bandwidth_bytes_per_s
    with pytest.raises(UsageError, match="No GPU is called 'rtx-9090'"):
        gpus_of(["rtx-9090"])
