"""Records as one tidy table: a row a run, a column a quantity, every kind of run in it.

A column is named by its place in the record, such as ``results.ttft_s.mean`` or ``spec.serving.dtype``; its
unit is in its name, and its meaning in `evalsuite.core.record`. What a run does not have is missing, never
zero. What has rows of its own (windows, tensors, layers, samples) is no column: it lies beside the record.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pandas as pd

from evalsuite.core.errors import UsageError
from evalsuite.core.record import Record
from evalsuite.store.runs import load_records

FIRST = ("run_id", "kind", "status", "started", "model.name", "gpu", "gpus")


def load_results(path: str | Path = "results") -> pd.DataFrame:
    """All finished runs of a results folder, kind by kind, newest first.

    A record that cannot be read is left out with a warning, and listed in the table's ``attrs["left_out"]``.

    Raises:
        UsageError: there is no such folder.
    """
    root = Path(path)
    if not root.is_dir():
        raise UsageError(f"There is no folder {root}.", todo="name the folder that holds the records.")
    records, left_out = load_records(root)
    for reason in left_out:
        warnings.warn(f"left out: {reason}", stacklevel=2)
    frame = to_frame(records)
    frame.attrs["left_out"] = left_out
    return frame


def to_frame(records: Sequence[Record]) -> pd.DataFrame:
    """One row a record. A column that holds numbers in some runs and words in others holds words in all."""
    rows = [dict(_row(record)) for record in records]
    names = dict.fromkeys((*FIRST, *(name for row in rows for name in row)))
    columns: dict[str, pd.Series[Any]] = {}
    for name in names:
        values = [row.get(name) for row in rows]
        kinds = {_kind(value) for value in values if value is not None}
        if len(kinds) > 1:
            values = [None if value is None else str(value) for value in values]
        columns[name] = pd.Series(values, dtype=object)
    return pd.DataFrame(columns).convert_dtypes()


def _kind(value: object) -> str:
    return "number" if type(value) in (int, float) else type(value).__name__


def _row(record: Record) -> Iterator[tuple[str, Any]]:
    gpus = record.machine.gpus
    yield "gpu", gpus[0].name if gpus else None
    yield "gpus", len(gpus)
    if record.expert_cache is not None:
        yield "expert_cache.hit_rate", record.expert_cache.hit_rate
        yield "expert_cache.overflow_steps", record.expert_cache.overflow_steps
        yield "expert_cache.bytes_moved", record.expert_cache.bytes_moved
    yield from _leaves(record.model_dump(mode="json"), "")


def _leaves(value: Mapping[str, Any], place: str) -> Iterator[tuple[str, Any]]:
    """Scalars under their dotted names; lists of scalars joined, lists of rows left out."""
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _leaves(cast("dict[str, Any]", item), f"{place}{key}.")
        elif isinstance(item, list):
            parts = cast("list[Any]", item)
            if not any(isinstance(part, dict | list) for part in parts):
                yield f"{place}{key}", "; ".join(map(str, parts)) or None
        elif item is not None:
            yield f"{place}{key}", item
