"""Quantized checkpoints score as the same weights do when they are written out plainly."""

import json
import shutil

import numpy as np
import pytest
from safetensors.torch import save_file

from engines import tiny
from evalsuite.core.errors import EvalError, ModelError
from evalsuite.data.windows import TokenWindow
from evalsuite.engines.dequantize import dequantize_state
from evalsuite.quant.pipeline import quantize
from evalsuite.quant.recipe import Recipe

ARCHITECTURES = ("llama", "qwen3_moe", "qwen3_5_moe_text", "qwen3_5_moe", "stacked")


@pytest.fixture(params=ARCHITECTURES)
def source(request, checkpoints):
    return request.getfixturevalue("stacked") if request.param == "stacked" else checkpoints[request.param]


def nats(folder, **options):
    ids = np.random.default_rng(3).integers(0, 64, 60)
    with tiny.scorer(folder, **options) as scorer:
        (score,) = scorer.score([TokenWindow(0, ids, 1)])
        return score.nats, scorer.facts


def written_out(folder, target):
    """The same weights as a plain BF16 checkpoint."""
    state = {t.name: t.value.bfloat16() for t in dequantize_state(folder)}
    target.mkdir()
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    config.get("text_config", {}).pop("quantization_config", None)
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_hlwq_codes_equal_their_decoded_weights(source, tmp_path):
    quantize(source, tmp_path / "codes", Recipe(format="hlwq"), device="cpu")
    quantize(source, tmp_path / "plain", Recipe(format="bf16"), device="cpu")
    (codes, facts), (plain, _), (whole, _) = (
        nats(folder, dtype="bfloat16") for folder in (tmp_path / "codes", tmp_path / "plain", source)
    )
    np.testing.assert_array_equal(codes, plain)
    assert abs(codes - whole).max() > 1e-3, "quantisation changes something"
    assert facts.stored == "hlwq safetensors"
    assert facts.engaged["dequantised_tensors"] > 4


@pytest.mark.parametrize("method", ["rtn", "hlwq"])
def test_int4_equals_its_decoded_weights(source, tmp_path, method):
    quantize(source, tmp_path / "int4", Recipe(method=method), device="cpu")
    found, facts = nats(tmp_path / "int4", dtype="bfloat16")
    assert facts.stored == "compressed-tensors safetensors"
    plain = written_out(tmp_path / "int4", tmp_path / "plain")
    np.testing.assert_array_equal(found, nats(plain, dtype="bfloat16")[0])
    assert abs(found - nats(source, dtype="bfloat16")[0]).max() > 1e-3


def test_a_multimodal_wrapper_scores_as_its_text_model(checkpoints):
    ids = np.random.default_rng(3).integers(0, 64, 60)
    with tiny.scorer(checkpoints["qwen3_5_moe"]) as scorer:
        assert scorer.facts.vocabulary == 64
        assert "visual" not in str(scorer._model)
        (score,) = scorer.score([TokenWindow(0, ids, 1)])
    assert np.isfinite(score.nats).all()


def test_stacked_experts_score_as_single_ones(checkpoints, stacked):
    np.testing.assert_array_equal(nats(stacked)[0], nats(checkpoints["qwen3_5_moe"])[0])


def test_a_checkpoint_that_says_it_is_quantized_and_is_not(checkpoints, tmp_path):
    folder = tmp_path / "claimed"
    shutil.copytree(checkpoints["llama"], folder)
    quantize(checkpoints["llama"], tmp_path / "int4", Recipe(), device="cpu")
    declared = json.loads((tmp_path / "int4" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(declared))
    with pytest.raises(EvalError, match="none of its tensors is"):
        nats(folder)


def test_a_kind_that_cannot_be_read(checkpoints, tmp_path):
    folder = tmp_path / "gptq"
    shutil.copytree(checkpoints["llama"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(ModelError, match=r"cannot be dequantised|could not be loaded"):
        nats(folder)
