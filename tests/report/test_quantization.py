"""The tables and the picture of a quantization, for what they say and what they must not hide."""

import warnings
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from evalsuite.core.record import QuantizedPart, QuantizeResult
from evalsuite.quant.recipe import Recipe
from evalsuite.report.plots import quantization_error
from evalsuite.report.quantization import (
    class_table,
    errors_by_layer,
    quantization_table,
    recipe_text,
    unchanged_table,
)


def part(name: str, **changes: Any) -> QuantizedPart:
    data: dict[str, Any] = {
        "name": name, "layer": None, "layer_class": name, "fate": "quantized", "reason": "", "matrices": 2,
        "weights": 1_000_000, "squared_error": 1.0, "squared_weight": 100.0, "outliers": 3,
        "bytes_before": 2_000_000, "bytes_after": 515_625,
    }  # fmt: skip
    return QuantizedPart.model_validate(data | changes)


KEPT = {"squared_error": 0.0, "squared_weight": 0.0, "outliers": 0, "bytes_after": 2_000_000}


@pytest.fixture
def result() -> QuantizeResult:
    return QuantizeResult(
        source="demo", source_fingerprint="a", destination="out", fingerprint="b",
        total=part("quantized weights", layer_class="all"),
        classes=(
            part("attention"),
            part("norm", fate="kept", reason="one number a channel", **KEPT),
            part("mlp", fate="unfit", reason="in-dimension 576 is not a multiple", **KEPT),
        ),
        layers=(
            part("layer 0", layer=0, layer_class="attention", squared_error=1.0),
            part("layer 1", layer=1, layer_class="attention", squared_error=4.0),
        ),
        unfit=(), bytes_before=10_000_000, bytes_after=4_000_000, bits_per_weight=16.0,
        code_bits_per_weight=5.125, compression_ratio=2.5, device="cpu", quantize_s=2.0,
        bytes_read=10_000_000, bytes_per_s=5e6,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        (Recipe(), "5 bits Lloyd–Max + Hadamard → INT4, group 128"),
        (Recipe(method="rtn", scale="mse", group_size=64), "INT4 with searched scale, group 64"),
        (Recipe(method="rtn", format="bf16"), "INT4, decoded, group 128"),
        (Recipe(format="hlwq", hlwq_bits=4), "4 bits Lloyd–Max + Hadamard, group 128"),
        (
            Recipe(format="bf16", codebook="absmax", hadamard=False),
            "5 bits absmax, decoded, group 128",
        ),
    ],
)
def test_a_recipe_in_a_line(recipe: Recipe, text: str):
    assert recipe_text(recipe.as_dict()) == text


def test_errors_are_divided_from_the_sums(result: QuantizeResult):
    (row,) = class_table(result).cells()  # one class needs no line of totals
    assert row == [
        "attention", "2", "1,000,000", "10.00", "20.00", "3", "4.125", "2 MB", "516 kB",
    ]  # fmt: skip


def test_what_stays_is_listed_with_its_reason(result: QuantizeResult):
    rows = unchanged_table(result).cells()
    assert [(row[0], row[3]) for row in rows] == [
        ("norm", "one number a channel"),
        ("mlp", "in-dimension 576 is not a multiple"),
    ]


def test_decoded_weights_show_the_bits_of_their_codes_too(result: QuantizeResult):
    decoded = dict(quantization_table(result, Recipe(format="bf16").as_dict()).cells())
    assert decoded["bits per weight, as stored"] == "16.000"
    assert decoded["bits per weight of the codes"] == "5.125"
    assert decoded["compression ratio"] == "2.50"
    assert "bits per weight of the codes" not in dict(quantization_table(result, Recipe().as_dict()).cells())


def test_nothing_lost_is_a_dash_and_not_infinite_decibels(result: QuantizeResult):
    whole = result.model_copy(update={"total": part("all", squared_error=0.0)})
    cells = dict(quantization_table(whole, Recipe().as_dict()).cells())
    assert cells["SQNR [dB]"] == "—"
    assert cells["error ‖W − Ŵ‖ / ‖W‖ [%]"] == "0.00"


def test_lines_of_the_picture(result: QuantizeResult):
    assert errors_by_layer(result) == {"attention": {0: 0.1, 1: 0.2}}


@pytest.mark.parametrize(
    "lines",
    [
        {"attention": {0: 0.1}},
        {"attention": {0: 0.0, 1: 0.0}},
        {f"class {i}": dict.fromkeys(range(30), 0.1 + 0.01 * i) for i in range(6)},
        {"a $dollar$ sign": {0: 0.1, 3: 0.12}, "_hidden": {1: 0.11}},
    ],
    ids=["one point", "no error", "more classes than colours", "odd names"],
)
def test_the_picture(lines: dict[str, dict[int, float]], tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        png, svg = quantization_error(lines, "demo by layer", "INT4, group 128.", tmp_path / "error")
    assert imread(png).shape[:2] == (690, 1200)
    again = quantization_error(lines, "demo by layer", "INT4, group 128.", tmp_path / "again")
    assert again[1].read_bytes() == svg.read_bytes()
