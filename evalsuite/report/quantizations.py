"""The tables of several quantizations: recipes side by side, and which tensors each of them counted."""

from collections.abc import Sequence
from dataclasses import dataclass

from evalsuite.core.record import QuantizedPart, QuantizeResult, Record
from evalsuite.core.units import byte_unit
from evalsuite.report.quantization import STORED, recipe_text
from evalsuite.report.tables import NOT_MEASURED, Cell, Column, Table
from evalsuite.report.varying import settle

FATES = {"quantized": "quantized", "kept": "left by the rules", "unfit": "left: does not fit the group"}


def result_of(record: Record) -> QuantizeResult:
    assert isinstance(record.results, QuantizeResult)
    return record.results


def recipes_table(records: Sequence[Record]) -> Table[Record]:
    """Recipe, error, bits and size, a quantization a row.

    Args:
        records: of one source.
    """
    unit, size = byte_unit(max(result_of(record).bytes_before for record in records))
    labels, shared = settle(
        (
            Column[Record]("result", lambda r: result_of(r).destination, label=True),
            Column[Record]("recipe", lambda r: recipe_text(r.spec["recipe"]), label=True),
            Column[Record]("stored as", lambda r: STORED[r.spec["recipe"]["format"]], label=True),
            Column[Record]("on", lambda r: result_of(r).device, label=True),
        ),
        records,
    )
    return Table(
        f"Quantizations of {result_of(records[0]).source}",
        [
            *labels,
            Column[Record]("error", lambda r: _percent(result_of(r).total), "%", "lower"),
            Column[Record]("SQNR", lambda r: _decibel(result_of(r).total), "dB", "higher"),
            Column[Record](
                "bits a weight", lambda r: f"{result_of(r).code_bits_per_weight:.3f}", better="lower"
            ),
            Column[Record]("weights", lambda r: f"{result_of(r).total.weights:,}"),
            Column[Record]("before", lambda r: f"{result_of(r).bytes_before / size:.3g}", unit),
            Column[Record]("after", lambda r: f"{result_of(r).bytes_after / size:.3g}", unit, "lower"),
            Column[Record]("ratio", lambda r: f"{result_of(r).compression_ratio:.2f}", better="higher"),
            Column[Record]("time", lambda r: f"{result_of(r).quantize_s:.1f}", "s", "lower"),
        ],
        records,
        f"Error ‖W − Ŵ‖ / ‖W‖, signal to noise and bits are of the quantized weights; bits are those of the "
        f"codes with scales, norms and shapes. Before and after: the whole checkpoint. {shared} A "
        "smaller error of the weights need not be a smaller perplexity.",
        lambda r: (r.run_id,),
    )


@dataclass(frozen=True)
class Counted:
    """A class of tensors in one quantization."""

    record: Record
    part: QuantizedPart


def counted_table(records: Sequence[Record]) -> Table[Counted]:
    """Every class of tensors: how many, quantized or not, and why.

    Args:
        records: quantizations of one source; those that treat all classes alike share their rows.
    """
    seen: dict[tuple[object, ...], Counted] = {}
    for record in records:
        for part in result_of(record).classes:
            key = (part.layer_class, part.fate, part.reason, part.matrices, part.weights)
            seen.setdefault(key, Counted(record, part))
    unit, size = byte_unit(max(c.part.bytes_before for c in seen.values()))
    return Table(
        f"Tensors of {result_of(records[0]).source}, counted",
        [
            Column[Counted]("class", lambda c: c.part.layer_class, label=True),
            Column[Counted]("fate", lambda c: FATES[c.part.fate], label=True),
            Column[Counted]("tensors", lambda c: f"{c.part.matrices:,}"),
            Column[Counted]("weights", lambda c: f"{c.part.weights:,}"),
            Column[Counted]("before", lambda c: f"{c.part.bytes_before / size:.3g}", unit),
            Column[Counted]("why", lambda c: c.part.reason or "—", prose=2),
        ],
        list(seen.values()),
        f"Of {len(records)} quantizations with the same rules; a class that two of them treat differently "
        "has two rows. Before: as stored in the source.",
        lambda c: (c.record.run_id,),
    )


def _percent(part: QuantizedPart) -> Cell | str:
    return NOT_MEASURED if part.relative_error is None else f"{100 * part.relative_error:.2f}"


def _decibel(part: QuantizedPart) -> Cell | str:
    return NOT_MEASURED if part.sqnr_db is None else f"{part.sqnr_db:.2f}"
