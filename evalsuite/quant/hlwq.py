"""HLWQ: each block of a row becomes low-bit codes and one float16 norm.

    r = ‖b‖₂ as float16,  z = √block · (b·H)/r,  code = the Lloyd–Max level of N(0,1) nearest to z,
    b̂ = r · (level·H)/√block

A rotated block of many weights is nearly Gaussian whatever the weights were, so one codebook serves all
tensors. The norm is rounded before it divides, so that the codes make up for its rounding. The reverse of
`encode` is `evalsuite.engines.dequantize.decode_hlwq`, with the levels of `scaled_levels`.
https://arxiv.org/abs/2603.29078
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from evalsuite.core.errors import ModelError
from evalsuite.engines.dequantize import decode_hlwq
from evalsuite.quant.hadamard import walsh_hadamard
from evalsuite.quant.lloyd_max import lloyd_max
from evalsuite.quant.recipe import HlwqScheme


def scaled_levels(scheme: HlwqScheme) -> tuple[float, ...]:
    """The value of each code in a block of norm 1, ascending.

    Lloyd–Max levels divided by √block, because the block's norm is √block times its root mean square; or
    k/(2^(bits−1) − 1) for every k of a two's-complement integer, of which the lowest is never the nearest.
    """
    if scheme.codebook == "absmax":
        top = 2 ** (scheme.bits - 1) - 1
        return tuple(k / top for k in range(-top - 1, top + 1))
    return tuple(level / math.sqrt(scheme.block) for level in lloyd_max(scheme.bits).levels)


def encode(weight: Tensor, scheme: HlwqScheme, name: str) -> tuple[Tensor, Tensor]:
    """Codes uint8 [..., blocks · block] and norms float16 [..., blocks] of float32 weights [..., columns].

    Args:
        name: of the tensor, for the error.

    Raises:
        ModelError: a weight is not finite, or a block's norm is beyond float16.
    """
    blocks = pad(weight, (0, -weight.shape[-1] % scheme.block)).unflatten(-1, (-1, scheme.block))
    if scheme.hadamard:
        blocks = walsh_hadamard(blocks)
    if scheme.codebook == "absmax":
        norms = blocks.abs().amax(-1).half()
    else:
        norms = torch.linalg.vector_norm(blocks, dim=-1).half()
    if not norms.isfinite().all():
        raise ModelError(
            f"{name} holds a block of weights that is not finite, or too large for a float16 norm.",
            cause="a NaN or an infinity in the checkpoint, or weights far beyond the usual.",
            todo="download the checkpoint again, or check the training run that wrote it.",
        )
    divisors = norms.float()
    divisors[divisors == 0] = 1  # a block of zeros; whatever its codes, a norm of 0 decodes to zeros
    return nearest(blocks / divisors.unsqueeze(-1), scheme).flatten(-2), norms


def decode(codes: Tensor, norms: Tensor, scheme: HlwqScheme, columns: int) -> Tensor:
    """The weights that codes and norms stand for, float32 [..., columns]."""
    levels = torch.tensor(scaled_levels(scheme), dtype=torch.float32, device=codes.device)
    return decode_hlwq(codes, norms, levels, hadamard=scheme.hadamard, columns=columns)


def nearest(values: Tensor, scheme: HlwqScheme) -> Tensor:
    """The code of the level nearest to each value, uint8 of the same shape; between two, the lower."""
    cells = _cells(scheme, values.device)
    if values.is_cuda:
        return torch.bucketize(values, cells.midpoints[:-1], out_int32=True).to(torch.uint8)
    # torch's binary search takes 25 ns a value on a CPU core. A table of equal cells, each of which at most
    # one midpoint comes near, leaves a single comparison: 5 ns.
    cell = (values - cells.start).mul_(1 / cells.width).clamp_(0, len(cells.below) - 1).int()
    codes = cells.below.index_select(0, cell.flatten())
    above = values.flatten() > cells.midpoints.index_select(0, codes)
    return codes.add_(above).to(torch.uint8).view(values.shape)


@dataclass(frozen=True)
class _Cells:
    """Midpoints between levels, then infinity, and for each of many equal cells how many lie surely below."""

    midpoints: Tensor
    below: Tensor
    start: float
    width: float


@lru_cache(maxsize=32)
def _cells(scheme: HlwqScheme, device: torch.device) -> _Cells:
    levels = torch.tensor(scaled_levels(scheme), dtype=torch.float64)
    midpoints = ((levels[1:] + levels[:-1]) / 2).float()
    # A quarter of the least distance: a cell and its two neighbours, which float32 may confuse at their
    # edges, together hold one midpoint at most.
    width = float(midpoints.diff().min()) / 4
    start = float(midpoints[0]) - 2 * width
    count = math.ceil((float(midpoints[-1]) - start) / width) + 3
    lower_ends = start + width * (torch.arange(count) - 1)
    below = torch.bucketize(lower_ends, midpoints, right=True, out_int32=True)
    ends = torch.tensor([math.inf])
    return _Cells(torch.cat([midpoints, ends]).to(device), below.to(device), start, width)
