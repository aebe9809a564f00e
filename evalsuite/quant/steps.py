"""A stack of weight matrices through a recipe's steps: what is stored, and what a loader will make of it."""

from dataclasses import dataclass

from torch import Tensor

from evalsuite.engines.dequantize import CODES, NORMS, PACKED, SCALE, decode_int4
from evalsuite.quant import grid, hlwq
from evalsuite.quant.pack import pack_codes, pack_int4
from evalsuite.quant.recipe import Recipe


@dataclass(frozen=True)
class Coded:
    """The result for matrices [..., rows, columns].

    Attributes:
        parts: what is stored, by the last part of its name; empty where the decoded weights are.
        decoded: the weights as they are read back, float32, or bfloat16 where that is what is stored.
    """

    parts: dict[str, Tensor]
    decoded: Tensor


def code(weights: Tensor, recipe: Recipe, name: str) -> Coded:
    """Quantize float32 weights [..., rows, columns] on whatever device they are.

    Between HLWQ and the INT4 grid the decoded weights stay float32; the published pipeline does not say.

    Args:
        name: of the tensor, for errors.

    Raises:
        ModelError: a weight is not finite, or too large to be coded.
    """
    decoded, parts = weights, {}
    if recipe.scheme:
        codes, norms = hlwq.encode(weights, recipe.scheme, name)
        decoded = hlwq.decode(codes, norms, recipe.scheme, weights.shape[-1])
        if recipe.format == "hlwq":
            parts = {CODES: pack_codes(codes, recipe.scheme.bits), NORMS: norms}
    if recipe.grid:
        codes, scales = grid.encode(decoded, recipe.grid, name)
        decoded = decode_int4(codes, scales)
        if recipe.format == "int4":
            parts = {PACKED: pack_int4(codes), SCALE: scales}
    return Coded(parts, decoded.bfloat16() if recipe.format == "bf16" else decoded)
