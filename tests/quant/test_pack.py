import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from evalsuite.engines.dequantize import unpack_codes, unpack_int4
from evalsuite.quant.pack import pack_codes, pack_int4
from quant import oracles


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 6), rows=st.integers(1, 4), groups=st.integers(1, 6), seed=st.integers(0, 2**31 - 1)
)
def test_codes_round_trip(bits, rows, groups, seed):
    codes = torch.from_numpy(
        np.random.default_rng(seed).integers(0, 2**bits, (rows, 8 * groups), dtype=np.uint8)
    )
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, groups * bits)
    assert torch.equal(unpack_codes(packed, bits), codes)


@pytest.mark.parametrize("bits", range(2, 7))
def test_the_order_of_bits_is_the_documented_one(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, 64, dtype=np.uint8)
    assert pack_codes(torch.from_numpy(codes), bits).tolist() == oracles.bit_stream(codes, bits)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 70), seed=st.integers(0, 2**31 - 1))
def test_int4_equals_compressed_tensors_bit_for_bit(rows, columns, seed):
    codes = torch.from_numpy(np.random.default_rng(seed).integers(-8, 8, (rows, columns), dtype=np.int8))
    packed = pack_int4(codes)
    assert torch.equal(packed, pack_to_int32(codes, 4))
    assert torch.equal(unpack_int4(packed, columns), codes)
    assert torch.equal(unpack_int4(packed, columns), unpack_from_int32(packed, 4, codes.shape))


def test_int4_stacks_equal_compressed_tensors():
    codes = torch.randint(-8, 8, (3, 4, 64), dtype=torch.int8)
    assert torch.equal(pack_int4(codes), pack_to_int32(codes, 4))
