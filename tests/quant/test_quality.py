import math

import pytest
import torch

from evalsuite.core.record import QuantizedPart
from evalsuite.quant.quality import error_sums, merged, squared_sums


def row(name="model.layers.0.mlp.up_proj", **values):
    defaults = {
        "layer": 0, "layer_class": "mlp", "fate": "quantized", "reason": "", "matrices": 1, "weights": 100,
        "squared_error": 1.0, "squared_weight": 100.0, "outliers": 2, "bytes_before": 200, "bytes_after": 50,
    }  # fmt: skip
    return QuantizedPart(name=name, **(defaults | values))


def test_ratios():
    assert row().relative_error == pytest.approx(0.1)
    assert row().sqnr_db == pytest.approx(20)
    assert row().outlier_share == 0.02
    assert row().bits_per_weight == 4
    assert row().compression_ratio == 4


def test_nothing_to_divide_by():
    assert row(squared_error=0.0).sqnr_db is None
    assert row(squared_weight=0.0).relative_error is None
    assert row(fate="kept").outlier_share is None


def test_merging_adds_sums_and_not_ratios():
    (both,) = merged([row(), row(squared_error=3.0, weights=300, outliers=0)])
    assert both.relative_error == pytest.approx(math.sqrt(4 / 200))
    assert both.outlier_share == 2 / 400
    assert both.matrices == 2
    assert len(merged([row(), row("model.layers.1.mlp.up_proj")])) == 2


def test_rows_survive_being_written():
    assert QuantizedPart.model_validate(row().model_dump()) == row()


def test_sums_of_a_stack():
    weights = torch.randn(3, 8, 64)
    weights[1, 0, 0] = 100
    decoded = weights + 0.1
    means = squared_sums(weights) / (8 * 64)
    sums = error_sums(weights, decoded, means)
    torch.testing.assert_close(sums[:, 0], torch.full((3,), 8 * 64 * 0.01).double(), rtol=1e-3, atol=0)
    torch.testing.assert_close(sums[:, 1], weights.double().square().sum((1, 2)), rtol=1e-5, atol=0)
    assert sums[:, 2].tolist() == [0, 1, 0]
