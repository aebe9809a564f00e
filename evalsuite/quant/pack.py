"""Codes into the bytes that are stored; `evalsuite.engines.dequantize` defines both orders and reads them."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from evalsuite.engines.dequantize import INT4_OFFSET


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """HLWQ codes as one little-endian bit stream a row: uint8 [..., n·bits/8] from uint8 [..., n].

    Args:
        codes: each below 2^bits; n is a multiple of 8.
    """
    groups = codes.unflatten(-1, (-1, 8))
    words = groups[..., 0].to(torch.int64)
    for i in range(1, 8):
        words |= groups[..., i].to(torch.int64) << bits * i
    packed = torch.empty(*words.shape, bits, dtype=torch.uint8, device=codes.device)
    for i in range(bits):
        packed[..., i] = (words >> 8 * i) & 255
    return packed.flatten(-2)


def pack_int4(codes: Tensor) -> Tensor:
    """INT4 codes as compressed-tensors packs them: int32 [..., ⌈n/8⌉] from int8 [..., n].

    Bit for bit what its ``pack_to_int32(codes, 4)`` makes, and for stacks of matrices at once.
    """
    groups = pad(codes + INT4_OFFSET, (0, -codes.shape[-1] % 8)).unflatten(-1, (-1, 8))
    words = groups[..., 0].to(torch.int32)
    for i in range(1, 8):
        words |= groups[..., i].to(torch.int32) << 4 * i
    return words
