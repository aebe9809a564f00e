"""How far the written weights are from the original ones: sums per row, divided when read.

- relative error ‖W − Ŵ‖ / ‖W‖, with Ŵ the weights as a loader gets them (code · scale, or rounded to BF16);
- SQNR = 10·log₁₀(‖W‖² / ‖W − Ŵ‖²) in dB, the same in other units;
- outlier share: weights beyond six times the root mean square of their own matrix, whose mean is taken as 0.
  A normal distribution has 2·10⁻⁹ of them, so a share above that says how far from normal the weights are;
- bits per weight: everything that is stored for a weight, scales, norms and shapes included.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from evalsuite.core.record import QuantizedPart
from evalsuite.quant.recipe import Recipe

OUTLIER_SIGMAS = 6
Place = tuple[str, int | None, str]  # name, layer, class
SUMS = (
    "matrices", "weights", "squared_error", "squared_weight", "outliers", "bytes_before", "bytes_after"
)  # fmt: skip


@dataclass(frozen=True)
class QuantReport:
    """What a quantization did.

    Attributes:
        recipe: what was asked for.
        rows: one per matrix or per projection of a layer's experts, in the order of the checkpoint.
        device: where it was computed.
        seconds: of this run; shards finished by an earlier one took none of it.
        bytes_read: of BF16 input in this run.
    """

    recipe: Recipe
    rows: tuple[QuantizedPart, ...]
    device: str
    seconds: float
    bytes_read: int

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)

    @property
    def compression_ratio(self) -> float:
        return self.bytes_before / self.bytes_after

    def quantized(self) -> QuantizedPart:
        """All quantized weights as one row."""
        rows = [row for row in self.rows if row.fate == "quantized"]
        return _grouped(rows, lambda _: ("quantized weights", None, "all"))[0]

    def by_class(self) -> tuple[QuantizedPart, ...]:
        """One row for each class and fate."""
        return _grouped(self.rows, lambda row: (row.layer_class, None, row.layer_class))

    def by_layer(self) -> tuple[QuantizedPart, ...]:
        """One row for each decoder layer's quantized weights."""
        rows = [row for row in self.rows if row.fate == "quantized" and row.layer is not None]
        return _grouped(rows, lambda row: (f"layer {row.layer}", row.layer, "all"))

    def unfit(self) -> tuple[QuantizedPart, ...]:
        """Weights that the rules would quantize, and whose shape did not allow it."""
        return tuple(row for row in self.rows if row.fate == "unfit")


def merged(rows: Iterable[QuantizedPart]) -> tuple[QuantizedPart, ...]:
    """Rows of the same name as one: the experts of a layer, which may lie in several shards."""
    return _grouped(rows, lambda row: (row.name, row.layer, row.layer_class))


def _grouped(
    rows: Iterable[QuantizedPart], key: Callable[[QuantizedPart], Place]
) -> tuple[QuantizedPart, ...]:
    sums: dict[tuple[Place, str, str], QuantizedPart] = {}
    for row in rows:
        name, layer, layer_class = key(row)
        group = ((name, layer, layer_class), row.fate, row.reason)
        so_far = sums.get(group)
        sums[group] = row.model_copy(
            update={"name": name, "layer": layer, "layer_class": layer_class}
            | {field: getattr(row, field) + (getattr(so_far, field) if so_far else 0) for field in SUMS}
        )
    return tuple(sums.values())


def squared_sums(weights: Tensor) -> Tensor:
    """Σw² of each matrix, float64 [matrices] from float32 [matrices, rows, columns]."""
    return weights.square().flatten(1).sum(1).double()


def error_sums(weights: Tensor, decoded: Tensor, mean_squares: Tensor) -> Tensor:
    """Σ(w − ŵ)², Σw² and the number of outliers of each matrix, float64 [matrices, 3].

    Args:
        weights: float32 [matrices, rows, columns], possibly a part of each matrix's rows.
        decoded: the same shape.
        mean_squares: of each whole matrix, [matrices].
    """
    errors = (weights - decoded).square_().flatten(1).sum(1)
    squares = weights.square().flatten(1)
    outliers = (squares > OUTLIER_SIGMAS**2 * mean_squares.to(squares).unsqueeze(1)).sum(1)
    return torch.stack([errors.double(), squares.sum(1).double(), outliers.double()], dim=1)
