import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

from evalsuite.core.errors import ModelError
from evalsuite.engines.dequantize import decode_int4
from evalsuite.quant.grid import encode
from evalsuite.quant.recipe import Int4Grid

ARGS = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=128)


@pytest.fixture
def weight():
    return torch.randn(16, 512, generator=torch.Generator().manual_seed(0)) * 0.03


def test_agrees_with_the_definition(weight):
    codes, scales = encode(weight, Int4Grid(), "w")
    groups = weight.double().numpy().reshape(16, 4, 128)
    scale = torch.from_numpy(np.abs(groups).max(-1) / 7).bfloat16()
    assert torch.equal(scales, scale)
    expected = np.clip(np.round(groups / scale.double().numpy()[..., None]), -8, 7).reshape(16, 512)
    assert (codes.numpy() != expected).mean() < 1e-3  # float32 may turn an exact half
    assert np.abs(codes.numpy() - expected).max() <= 1
    assert codes.dtype == torch.int8
    assert scales.dtype == torch.bfloat16


def test_codes_are_those_of_compressed_tensors_for_the_same_scale(weight):
    codes, scales = encode(weight, Int4Grid(), "w")
    zero = torch.zeros_like(scales, dtype=torch.int8)
    theirs = quantize(weight, scales.float(), zero, ARGS, dtype=torch.int8)
    assert torch.equal(codes, theirs)


def test_dequantised_as_compressed_tensors_does(weight):
    codes, scales = encode(weight, Int4Grid(), "w")
    assert torch.equal(decode_int4(codes, scales).bfloat16(), dequantize(codes, scales, args=ARGS))


def test_error_on_gaussian_weights():
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    assert float((decode_int4(*encode(weight, Int4Grid(), "w")) - weight).square().mean()) == pytest.approx(
        0.0138, abs=2e-4
    )


def test_searched_scales_are_never_worse(weight):
    def group_errors(rule):
        decoded = decode_int4(*encode(weight, Int4Grid(128, rule), "w"))
        return (decoded - weight).double().square().unflatten(-1, (-1, 128)).sum(-1)

    plain, searched = group_errors("max"), group_errors("mse")
    assert (searched <= plain * (1 + 1e-6)).all()
    assert searched.sum() < 0.85 * plain.sum()


@pytest.mark.parametrize("rule", ["max", "mse"])
def test_a_group_of_zeros(weight, rule):
    weight[3, 128:256] = 0
    codes, scales = encode(weight, Int4Grid(128, rule), "w")
    assert scales[3, 1] == 1
    assert (decode_int4(codes, scales)[3, 128:256] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(weight, bad):
    weight[0, 0] = bad
    with pytest.raises(ModelError, match=r"layers\.3\.q_proj"):
        encode(weight, Int4Grid(), "layers.3.q_proj")
