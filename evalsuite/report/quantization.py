"""The tables of a quantization."""

from collections.abc import Mapping
from typing import Any

from evalsuite.core.record import QuantizedPart, QuantizeResult
from evalsuite.core.units import duration, si_bytes
from evalsuite.report.perplexity import Pair
from evalsuite.report.tables import NOT_MEASURED, Cell, Column, Table

CODEBOOKS = {"lloyd-max": "Lloyd–Max", "absmax": "absmax"}
STORED = {"int4": "INT4", "hlwq": "HLWQ codes", "bf16": "decoded to BF16"}


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """A recipe in a line: ``5 bits Lloyd–Max + Hadamard → INT4, group 128``."""
    steps: list[str] = []
    if recipe["method"] == "hlwq":
        rotation = " + Hadamard" if recipe["hadamard"] else ""
        steps.append(f"{recipe['hlwq_bits']} bits {CODEBOOKS[recipe['codebook']]}{rotation}")
    if recipe["method"] == "rtn" or recipe["format"] == "int4":
        steps.append("INT4" + (" with searched scale" if recipe["scale"] == "mse" else ""))
    decoded = ", decoded" if recipe["format"] == "bf16" else ""
    return f"{' → '.join(steps)}{decoded}, group {recipe['group_size']}"


def quantization_table(result: QuantizeResult, recipe: Mapping[str, Any]) -> Table[Pair]:
    """What one quantization did, a quantity a row."""
    total = result.total
    rows: list[Pair] = [
        ("recipe", recipe_text(recipe)),
        ("stored as", STORED[recipe["format"]]),
        ("error ‖W − Ŵ‖ / ‖W‖ [%]", _percent(total.relative_error)),
        ("SQNR [dB]", _decibel(total)),
        ("bits per weight, as stored", f"{result.bits_per_weight:.3f}"),
    ]
    if recipe["format"] == "bf16":
        rows.append(("bits per weight of the codes", f"{result.code_bits_per_weight:.3f}"))
    rows += [
        ("checkpoint before, after", f"{si_bytes(result.bytes_before)}, {si_bytes(result.bytes_after)}"),
        ("compression ratio", f"{result.compression_ratio:.2f}"),
        ("time", f"{duration(result.quantize_s)}, {result.bytes_per_s / 1e9:.3g} GB/s on {result.device}"),
    ]
    return Table(
        f"{result.source} into {result.destination}",
        (Column[Pair]("quantity", lambda r: r[0]), Column[Pair]("value", lambda r: r[1])),
        rows,
        "Errors and bits are of the quantized weights; bits include scales, norms and shapes.",
    )


def class_table(result: QuantizeResult) -> Table[QuantizedPart]:
    """The quantized weights by class, and all of them."""
    quantized = [part for part in result.classes if part.fate == "quantized"]
    return Table(
        "Quantized",
        (
            Column[QuantizedPart]("class", lambda p: p.layer_class),
            Column[QuantizedPart]("matrices", lambda p: f"{p.matrices:,}"),
            Column[QuantizedPart]("weights", lambda p: f"{p.weights:,}"),
            Column[QuantizedPart]("error", lambda p: _percent(p.relative_error), "%", "lower"),
            Column[QuantizedPart]("SQNR", _decibel, "dB", "higher"),
            Column[QuantizedPart]("outliers", lambda p: f"{1e6 * p.outliers / p.weights:.3g}", "per million"),
            Column[QuantizedPart]("bits per weight", lambda p: f"{8 * p.bytes_after / p.weights:.3f}"),
            Column[QuantizedPart]("before", lambda p: si_bytes(p.bytes_before)),
            Column[QuantizedPart]("after", lambda p: si_bytes(p.bytes_after)),
        ),
        [*quantized, result.total] if len(quantized) > 1 else quantized,
        "Error is ‖W − Ŵ‖ / ‖W‖. Outliers are weights beyond six times the root mean square of their "
        "matrix; a normal distribution has 0.002 per million.",
    )


def unchanged_table(result: QuantizeResult) -> Table[QuantizedPart]:
    """What stayed as it is, and why."""
    return Table(
        "Left as they are",
        (
            Column[QuantizedPart]("class", lambda p: p.layer_class),
            Column[QuantizedPart]("tensors", lambda p: f"{p.matrices:,}"),
            Column[QuantizedPart]("size", lambda p: si_bytes(p.bytes_after)),
            Column[QuantizedPart]("why", lambda p: p.reason),
        ),
        [part for part in result.classes if part.fate != "quantized"],
    )


def errors_by_layer(result: QuantizeResult) -> dict[str, dict[int, float]]:
    """Class to layer to relative error, for `plots.quantization_error`; empty where no layer is quantized."""
    lines: dict[str, dict[int, float]] = {}
    for part in result.layers:
        if part.layer is not None and part.relative_error is not None:
            lines.setdefault(part.layer_class, {})[part.layer] = part.relative_error
    return lines


def _percent(share: float | None) -> Cell | str:
    return NOT_MEASURED if share is None else f"{100 * share:.2f}"


def _decibel(part: QuantizedPart) -> Cell | str:
    return NOT_MEASURED if part.sqnr_db is None else f"{part.sqnr_db:.2f}"
