"""The INT4 grid: symmetric 4-bit integers, a group of a row's weights with one bfloat16 scale.

    scale = max|w|/7 as bfloat16,  code = round(w/scale) in −8…7,  ŵ = code · scale

The weights are divided by the scale as it is stored, so that its rounding does not add to the error. With
max|w|/7 the code −8 is never used; compressed-tensors' own observers divide by 7.5 and clip instead, and the
search below covers that choice among others.
"""

import torch
from torch import Tensor

from evalsuite.core.errors import ModelError
from evalsuite.quant.recipe import Int4Grid

LOWEST, HIGHEST = -8, 7
SHRINKS = tuple(1 - 0.02 * i for i in range(21))  # 1.00, 0.98 … 0.60 of max|w|/7


def encode(weight: Tensor, grid: Int4Grid, name: str) -> tuple[Tensor, Tensor]:
    """Codes int8 [..., columns] and scales bfloat16 [..., columns/group] of float32 weights [..., columns].

    A group of zeros has scale 1, so that no reader divides by zero.

    Args:
        weight: the group divides its columns evenly.
        name: of the tensor, for the error.

    Raises:
        ModelError: a weight is not finite.
    """
    groups = weight.unflatten(-1, (-1, grid.group))
    full = groups.abs().amax(-1) / HIGHEST
    if not full.isfinite().all():
        raise ModelError(
            f"{name} holds a weight that is not finite.",
            cause="a NaN or an infinity in the checkpoint.",
            todo="download the checkpoint again, or check the training run that wrote it.",
        )
    scales = _stored(full) if grid.scale == "max" else _least_squares(groups, full)
    return _round(groups, scales).to(torch.int8).flatten(-2), scales


def _stored(scales: Tensor) -> Tensor:
    stored = scales.bfloat16()
    stored[stored == 0] = 1
    return stored


def _round(groups: Tensor, scales: Tensor) -> Tensor:
    return (groups / scales.float().unsqueeze(-1)).round_().clamp_(LOWEST, HIGHEST)


def _least_squares(groups: Tensor, full: Tensor) -> Tensor:
    """For each group the best of `SHRINKS` by squared error; the unshrunk scale wins a tie."""
    best, least = _stored(full), torch.full_like(full, torch.inf)
    for shrink in SHRINKS:
        scales = _stored(full * shrink)
        rounded = _round(groups, scales) * scales.float().unsqueeze(-1)
        error = torch.linalg.vector_norm(rounded.sub_(groups), dim=-1)
        better = error < least
        best, least = torch.where(better, scales, best), torch.where(better, error, least)
    return best
