"""Whole checkpoints: every architecture in every format, read back by other people's code."""

import json
import re
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from transformers import AutoConfig, AutoModelForCausalLM

from evalsuite.core.errors import ModelError, ResumeMismatch, UsageError
from evalsuite.engines.dequantize import dequantize_state, is_quantized
from evalsuite.quant import pipeline
from evalsuite.quant.pipeline import quantize
from evalsuite.quant.recipe import Recipe
from quant.files import edit_config, load_state, spoil

RECIPES = {
    "rtn": Recipe(method="rtn"),
    "rtn-mse": Recipe(method="rtn", scale="mse"),
    "hlwq-int4": Recipe(),
    "hlwq-codes": Recipe(format="hlwq"),
    "hlwq-decoded": Recipe(format="bf16"),
    "absmax": Recipe(format="bf16", codebook="absmax", hadamard=False),
    "hadamard-only": Recipe(format="bf16", codebook="absmax"),
    "lloyd-max-only": Recipe(format="bf16", hadamard=False),
    "three-bits": Recipe(format="hlwq", hlwq_bits=3, group_size=32),
}
ARCHITECTURES = ("llama", "qwen3_moe", "qwen3_5_moe_text", "qwen3_5_moe", "stacked")
# Relative error of Gaussian weights: the square root of the quantizer's mean squared error.
EXPECTED_ERROR = {
    "rtn": 0.1174, "rtn-mse": 0.101, "hlwq-int4": 0.1275, "hlwq-codes": 0.0497, "hlwq-decoded": 0.0497,
    "absmax": 0.055, "hadamard-only": 0.055, "lloyd-max-only": 0.0497, "three-bits": 0.18,
}  # fmt: skip


@pytest.fixture(params=ARCHITECTURES)
def source(request, checkpoints):
    return request.getfixturevalue("stacked") if request.param == "stacked" else checkpoints[request.param]


def weights_of(folder):
    """Name → float32 weight of a result, and per-expert matrices of a source whichever way it stores them."""
    config = json.loads((folder / "config.json").read_text())
    if is_quantized(config):
        return {tensor.name: tensor.value.float() for tensor in dequantize_state(folder)}
    weights = {}
    for name, tensor in load_state(folder).items():
        stack = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", name)
        if not stack:
            weights[name] = tensor.float()
            continue
        for e, matrix in enumerate(tensor.float()):
            if stack[2] == "down_proj":
                weights[f"{stack[1]}.{e}.down_proj.weight"] = matrix
            else:
                for projection, half in zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True):
                    weights[f"{stack[1]}.{e}.{projection}.weight"] = half
    return weights


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_architecture_in_every_format(source, recipe, tmp_path):
    report = quantize(source, tmp_path / "out", RECIPES[recipe], device="cpu")
    before, after = weights_of(source), weights_of(tmp_path / "out")
    assert before.keys() == after.keys()

    whole = report.quantized()
    errors = weights = 0.0
    changed = 0
    for name, weight in before.items():
        if torch.equal(weight, after[name]):
            continue
        changed += weight.numel()
        errors += float((weight - after[name]).double().square().sum())
        weights += float(weight.double().square().sum())
    assert changed == whole.weights
    assert whole.squared_error == pytest.approx(errors, rel=1e-4)
    assert whole.squared_weight == pytest.approx(weights, rel=1e-4)
    assert whole.relative_error == pytest.approx(EXPECTED_ERROR[recipe], rel=0.04)
    stored = sum(t.numel() * t.element_size() for t in load_state(tmp_path / "out").values())
    assert report.bytes_after == stored
    assert not (tmp_path / "out.partial").exists()
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def logits(model):
    with torch.inference_mode():
        return model(torch.arange(48)[None] % 64).logits.float()


@pytest.mark.parametrize("recipe", ["rtn", "hlwq-codes", "hlwq-decoded"])
def test_transformers_loads_the_result(source, recipe, tmp_path):
    """INT4 through its own compressed-tensors path too, and with the same result as through our reading."""
    out = tmp_path / "out"
    quantize(source, out, RECIPES[recipe], device="cpu")
    config = AutoConfig.from_pretrained(source).get_text_config()
    state = {name: weight.bfloat16() for name, weight in weights_of(out).items()}
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    ours, info = model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"]
    if recipe != "hlwq-codes":
        theirs, info = AutoModelForCausalLM.from_pretrained(
            out, dtype=torch.bfloat16, output_loading_info=True
        )
        assert not info["missing_keys"]
        assert not info["mismatched_keys"]
        assert torch.equal(logits(ours), logits(theirs))
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    distance = (logits(ours) - logits(original)).norm() / logits(original).norm()
    assert 0.005 < distance < 0.8  # unrelated logits are 1.4 apart


def test_compressed_tensors_decompresses_every_weight_alike(source, tmp_path):
    out = tmp_path / "out"
    quantize(source, out, RECIPES["hlwq-int4"], device="cpu")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    (scheme,) = QuantizationConfig.model_validate(config).config_groups.values()
    state, ours = load_state(out), weights_of(out)
    stems = [name.removesuffix(".weight_packed") for name in state if name.endswith(".weight_packed")]
    assert stems
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    for stem in stems:
        parts = {p: state[f"{stem}.{p}"] for p in ("weight_packed", "weight_scale", "weight_shape")}
        theirs = compressor.decompress(parts, scheme)["weight"]
        assert torch.equal(theirs, ours[f"{stem}.weight"].bfloat16())


def test_stacked_experts_give_the_file_that_separate_ones_give(checkpoints, stacked, tmp_path):
    quantize(checkpoints["qwen3_5_moe"], tmp_path / "a", Recipe(), device="cpu")
    quantize(stacked, tmp_path / "b", Recipe(), device="cpu")
    a, b = load_state(tmp_path / "a"), load_state(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_pieces_do_not_change_the_result(checkpoints, tmp_path, monkeypatch):
    source = checkpoints["llama"]
    whole = quantize(source, tmp_path / "a", Recipe(), device="cpu")
    monkeypatch.setattr(pipeline, "CPU_PIECE", 3000)  # 11 rows
    pieces = quantize(source, tmp_path / "b", Recipe(), device="cpu")
    a, b = load_state(tmp_path / "a"), load_state(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)
    for one, other in zip(whole.rows, pieces.rows, strict=True):
        assert one.outliers == other.outliers
        assert one.squared_error == pytest.approx(other.squared_error, rel=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_gpu_writes_what_the_cpu_writes(stacked, recipe, tmp_path):
    cpu = quantize(stacked, tmp_path / "cpu", RECIPES[recipe], device="cpu")
    gpu = quantize(stacked, tmp_path / "gpu", RECIPES[recipe], device="cuda")
    a, b = load_state(tmp_path / "cpu"), load_state(tmp_path / "gpu")
    assert all(a[name].shape == b[name].shape and a[name].dtype == b[name].dtype for name in a)
    # Float32 sums in another order turn a few near ties.
    a, b = weights_of(tmp_path / "cpu"), weights_of(tmp_path / "gpu")
    different = sum(int(((a[name] - b[name]).abs() > 1e-6).sum()) for name in a)
    assert different < 1e-2 * sum(weight.numel() for weight in a.values())
    assert gpu.quantized().relative_error == pytest.approx(cpu.quantized().relative_error, rel=1e-3)


def test_report(checkpoints, tmp_path):
    report = quantize(checkpoints["qwen3_5_moe_text"], tmp_path / "out", Recipe(format="hlwq"), device="cpu")
    classes = {row.name for row in report.by_class() if row.fate == "quantized"}
    assert classes == {"experts", "shared expert", "attention", "linear attention"}
    assert [row.layer for row in report.by_layer()] == [0, 1]
    names = [row.name for row in report.rows]
    assert names.count("model.layers.0.mlp.experts.*.gate_proj") == 1
    experts = next(row for row in report.rows if row.name == "model.layers.0.mlp.experts.*.gate_proj")
    assert (experts.matrices, experts.weights, experts.layer) == (4, 4 * 128 * 128, 0)
    # 5.125, and the 16 bytes of each small matrix's shape.
    assert experts.bits_per_weight == pytest.approx(5.125 + 128 / (128 * 128))
    assert all(row.reason for row in report.rows if row.fate != "quantized")
    assert report.bytes_before == sum(
        t.numel() * 2 for t in load_state(checkpoints["qwen3_5_moe_text"]).values()
    )


def test_outliers_are_counted(copy_of, llama, tmp_path):
    folder = copy_of(llama)
    name = "model.layers.1.mlp.up_proj.weight"

    def plant(weight):
        weight[:3, 0] = 1
        return weight

    spoil(folder, name, plant)
    report = quantize(folder, tmp_path / "out", Recipe(), device="cpu")
    assert sum(row.outliers for row in report.rows) == 3
    row = next(row for row in report.rows if row.outliers)
    assert row.name == name.removesuffix(".weight")
    assert row.outlier_share == 3 / row.weights


def test_what_does_not_fit_stays_and_is_reported(copy_of, checkpoints, tmp_path):
    folder = copy_of(checkpoints["llama"])
    spoil(folder, "model.layers.0.self_attn.o_proj.weight", lambda w: w[:, :96].contiguous())
    report = quantize(folder, tmp_path / "out", Recipe(), device="cpu")
    (row,) = report.unfit()
    assert row.name == "model.layers.0.self_attn.o_proj"
    assert "in-dimension 96" in row.reason
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert any(re.match(entry[3:], row.name) for entry in config["ignore"])
    kept = load_state(tmp_path / "out")["model.layers.0.self_attn.o_proj.weight"]
    assert kept.shape == (256, 96)


def test_a_block_of_zeros_survives(copy_of, llama, tmp_path):
    folder = copy_of(llama)
    name = "model.layers.0.mlp.down_proj.weight"
    spoil(folder, name, lambda w: w.index_fill(1, torch.arange(128), 0.0))
    for recipe in ("rtn", "hlwq-int4", "hlwq-codes", "hlwq-decoded"):
        quantize(folder, tmp_path / recipe, RECIPES[recipe], device="cpu")
        weight = weights_of(tmp_path / recipe)[name]
        assert (weight[:, :128] == 0).all()
        assert weight.isfinite().all()


@pytest.mark.parametrize("recipe", ["rtn", "hlwq-int4", "hlwq-codes"])
def test_a_nan_is_named_and_nothing_looks_whole(copy_of, llama, tmp_path, recipe):
    folder = copy_of(llama)

    def ruin(weight):
        weight[5, 7] = float("nan")
        return weight

    spoil(folder, "model.layers.1.mlp.gate_proj.weight", ruin)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.gate_proj"):
        quantize(folder, tmp_path / "out", RECIPES[recipe], device="cpu")
    assert not (tmp_path / "out").exists()


def test_unknown_architecture(copy_of, llama, tmp_path):
    folder = copy_of(llama)
    edit_config(folder, model_type="mamba")
    with pytest.raises(ModelError, match="qwen3_5_moe"):
        quantize(folder, tmp_path / "out", Recipe(), device="cpu")


def test_a_result_is_not_quantized_again(llama, tmp_path):
    quantize(llama, tmp_path / "once", Recipe(), device="cpu")
    with pytest.raises(ModelError, match="already"):
        quantize(tmp_path / "once", tmp_path / "twice", Recipe(), device="cpu")


@pytest.mark.parametrize("device", ["cuda:99", "tpu"])
def test_no_such_device(llama, tmp_path, device):
    with pytest.raises(UsageError, match=device):
        quantize(llama, tmp_path / "out", Recipe(), device=device)


def test_progress(llama, tmp_path):
    seen = []
    report = quantize(llama, tmp_path / "out", Recipe(), device="cpu", on_progress=seen.append)
    assert all(a.done < b.done for a, b in pairwise(seen))
    assert seen[-1].done == seen[-1].total == report.bytes_before == report.bytes_read
    assert seen[-1].seconds_left == 0
    assert seen[0].bytes_per_s > 0


KILLED = """
import os, signal, sys
from pathlib import Path
from evalsuite.quant.pipeline import quantize
from evalsuite.quant.recipe import Recipe

def kill(progress):
    if progress.done > progress.total / 2:
        os.kill(os.getpid(), signal.SIGKILL)

quantize(Path(sys.argv[1]), Path(sys.argv[2]), Recipe(), device="cpu", on_progress=kill)
"""


def test_a_killed_run_is_taken_up(checkpoints, tmp_path):
    source = checkpoints["qwen3_5_moe"]
    whole = quantize(source, tmp_path / "whole", Recipe(), device="cpu")
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "out")]
    assert subprocess.run(command, check=False).returncode == -9
    assert not (tmp_path / "out").exists()
    finished = list((tmp_path / "out.partial").glob("*.safetensors"))
    assert finished
    times = [path.stat().st_mtime_ns for path in finished]

    with pytest.raises(ResumeMismatch, match="recipe"):
        quantize(source, tmp_path / "out", Recipe(method="rtn"), device="cpu")
    seen = []
    resumed = quantize(source, tmp_path / "out", Recipe(), device="cpu", on_progress=seen.append)
    assert resumed.rows == whole.rows
    assert 0 < resumed.bytes_read < whole.bytes_read
    assert seen[0].resumed == whole.bytes_read - resumed.bytes_read
    assert [(tmp_path / "out" / path.name).stat().st_mtime_ns for path in finished] == times
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_source_that_changed_is_not_taken_up(copy_of, llama, tmp_path):
    folder = copy_of(llama)

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(folder, tmp_path / "out", Recipe(), device="cpu", on_progress=stop)
    spoil(folder, "model.layers.0.mlp.up_proj.weight", lambda w: w * 2)
    with pytest.raises(ResumeMismatch, match="source"):
        quantize(folder, tmp_path / "out", Recipe(), device="cpu")


MEMORY = """
import resource, sys
from pathlib import Path
from evalsuite.quant.pipeline import quantize
from evalsuite.quant.recipe import Recipe

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = peak()
quantize(Path(sys.argv[1]), Path(sys.argv[2]), Recipe(method="rtn"), device="cpu")
print(peak() - before)
"""


def test_memory_stays_below_the_shards_size(copy_of, llama, tmp_path):
    """Pages of the mapped source count here and can be dropped; nothing else grows with the model."""
    folder = copy_of(llama)
    spoil(folder, "model.layers.0.mlp.up_proj.weight", lambda w: w.repeat(400, 1))
    size = max(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert size > 75e6
    command = [sys.executable, "-c", MEMORY, str(folder), str(tmp_path / "out")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < size + 100e6
