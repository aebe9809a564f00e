import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evalsuite.core.errors import ModelError
from evalsuite.quant.hlwq import decode, encode, nearest, scaled_levels
from evalsuite.quant.lloyd_max import lloyd_max
from evalsuite.quant.recipe import HlwqScheme
from quant import oracles

ABLATION = [HlwqScheme(5, 128, c, h) for c, h in itertools.product(("absmax", "lloyd-max"), (False, True))]


def reference_levels(scheme):
    top = 2 ** (scheme.bits - 1) - 1
    if scheme.codebook == "absmax":
        return [k / top for k in range(-top - 1, top + 1)]
    return lloyd_max(scheme.bits).levels


@pytest.mark.parametrize("columns", [128, 256, 200])
@pytest.mark.parametrize(
    "scheme", [*ABLATION, HlwqScheme(2, 32), HlwqScheme(3, 64), HlwqScheme(6, 128)], ids=str
)
def test_agrees_with_the_definition(scheme, columns):
    weight = torch.randn(3, columns, generator=torch.Generator().manual_seed(columns)) * 0.02
    codes, norms = encode(weight, scheme, "w")
    decoded = decode(codes, norms, scheme, columns)
    levels = reference_levels(scheme)
    for i in range(len(weight)):
        expected, lengths, values, z = oracles.hlwq(
            weight[i].numpy(), levels, block=scheme.block, codebook=scheme.codebook, rotate=scheme.hadamard
        )
        np.testing.assert_array_equal(norms[i].numpy(), lengths)
        ours = codes[i].numpy()
        # float32 may decide a tie of float64 either way, and nothing else.
        for j in np.flatnonzero(ours != expected):
            middle = (levels[ours[j]] + levels[expected[j]]) / 2
            assert abs(z[j] - middle) < 1e-5
        if (ours == expected).all():
            np.testing.assert_allclose(decoded[i].numpy(), values, atol=1e-6)


@pytest.mark.parametrize("bits", range(2, 7))
def test_error_on_gaussian_weights_is_the_codebooks(bits):
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    scheme = HlwqScheme(bits)
    error = (decode(*encode(weight, scheme, "w"), scheme, 1024) - weight).square().mean()
    assert float(error) == pytest.approx(lloyd_max(bits).mse, rel=0.03)  # a block's own norm trims the tails


def test_rotation_tames_an_outlier():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    weight[:, 5] *= 30
    errors = {
        s.hadamard: float((decode(*encode(weight, s, "w"), s, 128) - weight).square().mean())
        for s in (HlwqScheme(hadamard=False, codebook="absmax"), HlwqScheme(codebook="absmax"))
    }
    assert errors[True] < errors[False] / 2


@pytest.mark.parametrize("scheme", ABLATION, ids=str)
def test_a_block_of_zeros_decodes_to_zeros(scheme):
    weight = torch.randn(4, 256)
    weight[1, :128] = 0
    codes, norms = encode(weight, scheme, "w")
    assert norms[1, 0] == 0
    decoded = decode(codes, norms, scheme, 256)
    assert (decoded[1, :128] == 0).all()
    assert decoded.isfinite().all()


@pytest.mark.parametrize("scheme", ABLATION, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_cannot_be_coded_is_named(scheme, bad):
    weight = torch.randn(4, 256)
    weight[2, 77] = bad
    with pytest.raises(ModelError, match=r"layers\.3\.q_proj"):
        encode(weight, scheme, "layers.3.q_proj")


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=200),
    bits=st.integers(2, 6),
    codebook=st.sampled_from(["lloyd-max", "absmax"]),
)
def test_nearest_is_nearest(values, bits, codebook):
    scheme = HlwqScheme(bits, 128, codebook)
    levels = np.array(scaled_levels(scheme))
    codes = nearest(torch.tensor(values), scheme).numpy()
    distances = np.abs(np.array(values, dtype=np.float32)[:, None] - levels)
    chosen = distances[np.arange(len(values)), codes]
    np.testing.assert_allclose(chosen, distances.min(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("codebook", ["lloyd-max", "absmax"])
@pytest.mark.parametrize("bits", range(2, 7))
def test_nearest_at_every_midpoint(bits, codebook):
    """The table of cells agrees with a binary search at, just above and just below each boundary."""
    scheme = HlwqScheme(bits, 128, codebook)
    levels = torch.tensor(scaled_levels(scheme), dtype=torch.float64)
    midpoints = ((levels[1:] + levels[:-1]) / 2).float()
    infinity = torch.tensor(float("inf"))
    values = torch.cat(
        [midpoints, midpoints.nextafter(infinity), midpoints.nextafter(-infinity), torch.tensor([-1e9, 1e9])]
    )
    assert torch.equal(nearest(values, scheme), torch.bucketize(values, midpoints).to(torch.uint8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_decides_like_the_cpu():
    for scheme in ABLATION:
        values = torch.randn(1 << 16)
        assert torch.equal(nearest(values, scheme), nearest(values.cuda(), scheme).cpu())
        weight = torch.randn(64, 1024)
        ours, theirs = (decode(*encode(w, scheme, "w"), scheme, 1024).cpu() for w in (weight, weight.cuda()))
        assert ((ours - theirs).abs() > 1e-5).float().mean() < 1e-4


def test_stacks_are_coded_as_their_matrices():
    stack = torch.randn(3, 8, 256)
    codes, norms = encode(stack, HlwqScheme(), "w")
    for i, matrix in enumerate(stack):
        assert torch.equal(encode(matrix, HlwqScheme(), "w")[0], codes[i])
        assert torch.equal(encode(matrix, HlwqScheme(), "w")[1], norms[i])


def test_bits_per_weight():
    assert HlwqScheme().bits_per_weight == 5.125
