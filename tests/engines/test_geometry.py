"""Sizes from a configuration, against real weights and against numbers worked out by hand."""

import struct
from pathlib import Path

import pytest

from engines import tiny
from evalsuite.core.errors import ModelError
from evalsuite.data.models import Checkpoint, find_checkpoint
from evalsuite.engines.geometry import Int4, read_geometry

CONFIGURATIONS = Path(__file__).resolve().parents[2] / "experiments" / "geometry"


def geometry(name, **options):
    folder = CONFIGURATIONS / f"qwen3.5-35b-a3b-{name}"
    return read_geometry(Checkpoint(name, folder), "bfloat16", **options)


@pytest.fixture(scope="module")
def int4():
    return geometry("int4")


@pytest.fixture(scope="module")
def bf16():
    return geometry("bf16")


def test_the_35b_model_in_int4(int4):
    # 3 · 512 · 2048 weights at half a byte, and a 2-byte scale for 128 of them
    assert int4.expert_bytes == 1_622_016
    assert (int4.expert_layers, int4.experts, int4.top_k) == (40, 256, 8)
    experts = 40 * 256 * int4.expert_bytes
    assert experts == pytest.approx(16.61e9, rel=1e-3)
    embeddings_and_head = 2 * 248_320 * 2048 * 2
    assert int4.total_bytes == pytest.approx(19.4e9, rel=5e-3)
    assert int4.total_bytes - experts - embeddings_and_head == pytest.approx(0.72e9, rel=0.2)
    assert int4.step_bytes(1, 0) == pytest.approx(2.4e9, rel=0.1)


def test_the_35b_model_in_bf16(bf16):
    assert bf16.expert_bytes == 3 * 512 * 2048 * 2
    assert bf16.total_bytes == pytest.approx(64.6 * 2**30, rel=5e-3)
    assert bf16.step_bytes(1, 0) == pytest.approx(6.6e9, rel=0.12)


def test_int4_that_is_decoded_on_loading_is_as_large_as_bf16(bf16):
    assert geometry("int4", dequantised=True) == bf16


def test_keys_values_and_states_of_the_35b_model(bf16):
    assert bf16.kv_bytes_per_token == 10 * 2 * 2 * 256 * 2
    assert bf16.state_bytes == 30 * (32 * 128 * 128 * 4 + 3 * (2 * 16 * 128 + 32 * 128) * 2)


def test_expert_slots_take_their_share(int4):
    assert int4.device_bytes(None) == int4.device_bytes(256) == int4.total_bytes
    slots = {n: int4.device_bytes(n) - int4.device_bytes(0) for n in (4, 8, 64, 128)}
    assert {n: round(size / 1e9, 2) for n, size in slots.items()} == {4: 0.26, 8: 0.52, 64: 4.15, 128: 8.30}


def test_distinct_experts_of_a_step(int4):
    assert int4.distinct_experts(1) == pytest.approx(8)
    assert int4.distinct_experts(2) == pytest.approx(16 - 64 / 256)  # one pair in 32 coincides
    assert int4.distinct_experts(10_000) == pytest.approx(256)


def test_a_step_grows_with_its_context_and_its_sequences(bf16):
    assert bf16.step_bytes(1, 1000) - bf16.step_bytes(1, 0) == 1000 * bf16.kv_bytes_per_token
    once = bf16.step_bytes(1, 0)
    assert once < bf16.step_bytes(8, 0) < 8 * once  # dense weights are read once for all


def test_the_built_in_model_is_as_large_as_its_file():
    checkpoint = find_checkpoint("demo")
    found = read_geometry(checkpoint, "bfloat16")
    (file,) = checkpoint.weight_files()
    (header,) = struct.unpack("<Q", file.read_bytes()[:8])
    assert found.total_bytes == file.stat().st_size - 8 - header
    assert (found.expert_layers, found.experts, found.top_k, found.context) == (2, 128, 8, 4096)
    assert read_geometry(checkpoint, "float32").total_bytes == 2 * found.total_bytes


def test_a_tied_head_is_read_and_counted_once(tmp_path):
    tied, untied = (tiny.llama(tie_word_embeddings=tie) for tie in (True, False))
    sizes = []
    for name, model in (("tied", tied), ("untied", untied)):
        found = read_geometry(find_checkpoint(str(tiny.write(model, tmp_path / name))), "float32")
        sizes.append((found.total_bytes, found.dense_bytes))
        assert found.total_bytes == 4 * sum(p.numel() for p in model.parameters())
    table = 4 * tiny.VOCABULARY * 32
    assert sizes == [(sizes[0][0], sizes[0][0]), (sizes[0][0] + table, sizes[0][0])]


def test_modules_may_be_named_as_in_the_multimodal_model():
    rule = Int4(128, ("model.language_model.layers.0.mlp.gate", r"re:(.*\.)?lm_head$"))
    assert not rule.covers("model.layers.0.mlp.gate")
    assert not rule.covers("lm_head")
    assert rule.covers("model.layers.0.mlp.gate_proj")


def test_gguf_has_no_configuration_to_read(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        read_geometry(Checkpoint("x", tmp_path, gguf="x.gguf"), "float32")
