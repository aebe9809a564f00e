"""Bounds and verdicts of cells whose times are made of known parts."""

import pytest

from evalsuite.core.bandwidth import Bandwidth
from evalsuite.core.geometry import Geometry
from evalsuite.core.roofline import bound, parts, verdict

GEOMETRY = Geometry(
    total_bytes=10_000, dense_bytes=1000, row_bytes=0, expert_bytes=10, expert_layers=5, experts=16, top_k=2,
    kv_bytes_per_token=1, state_bytes=50, token_weights=500, context=None,
)  # fmt: skip
GPU = Bandwidth(
    device="a GPU", copy_bytes_per_s=13_000, transfer_bytes_per_s=900, transfer_pieces_bytes_per_s=500,
    matrix_flop_per_s=1e6,
)  # fmt: skip
STEP = 1000 + 5 * 2 * 10 + 100 + 2 * 50  # dense, experts, keys and values of 100 tokens, states in and out


def cell(tokens_per_s, transfer=0, sequences=1, devices=1, gpu=GPU):
    return bound(
        GEOMETRY, gpu, sequences=sequences, context=100, devices=devices, transfer_bytes_per_step=transfer,
        decode_tokens_per_s=tokens_per_s,
    )  # fmt: skip


def test_the_bound_of_memory_alone():
    found = cell(5.0)
    assert found.bytes_per_token == STEP == 1300
    assert found.tokens_per_s == pytest.approx(10.0)
    assert found.share == pytest.approx(0.5)
    assert found.transfer_bandwidth_bytes_per_s is None
    assert parts(found) == (pytest.approx(0.5), 0.0, pytest.approx(1000 / 1e6 * 5))


def test_copied_experts_come_before_they_are_read():
    found = cell(2.5, transfer=50)  # 0.1 s to read and 0.1 s to copy
    assert found.tokens_per_s == pytest.approx(5.0)
    assert found.share == pytest.approx(0.5)
    assert found.transfer_bandwidth_bytes_per_s == 500
    assert parts(found)[:2] == (pytest.approx(0.25), pytest.approx(0.25))


def test_two_devices_read_half_each():
    assert cell(5.0, devices=2).tokens_per_s == pytest.approx(20.0)


def test_more_sequences_read_dense_weights_once():
    assert 1 / cell(1.0, sequences=4).tokens_per_s < 4 / cell(1.0).tokens_per_s


@pytest.mark.parametrize(
    ("found", "pair", "said"),
    [
        (cell(9.0), None, "memory 90 %"),
        (cell(4.0, transfer=50), None, "overhead 20 %"),
        (cell(2.0, transfer=200), None, "transfers 80 %"),
        (cell(0.5), 15.0, "launches: graphs are 15× faster"),
        (cell(0.5), None, "overhead 95 %"),
        (cell(0.5), 1.05, "overhead 95 %, not launches"),
        (cell(9.0), 1.3, "memory 90 %"),
        (
            cell(8.0, gpu=GPU.model_copy(update={"matrix_flop_per_s": 8888.0})),
            None,
            "compute 90 %",
        ),
    ],
)
def test_verdicts(found, pair, said):
    assert verdict(found, pair) == said
