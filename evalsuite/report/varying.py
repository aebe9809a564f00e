"""Columns that say what a row is: those that differ are shown, the others go into the caption."""

from collections.abc import Sequence
from typing import TypeVar

from evalsuite.report.tables import Column

Row = TypeVar("Row")


def settle(labels: Sequence[Column[Row]], rows: Sequence[Row]) -> tuple[list[Column[Row]], str]:
    """The first of the labels and those that vary; and a sentence on the values that all rows share.

    An empty value is not said.
    """
    shown = [label for i, label in enumerate(labels) if i == 0 or len({str(label.get(r)) for r in rows}) > 1]
    shared = [(c.heading, str(c.get(rows[0]))) for c in labels if c not in shown]
    said = [f"{heading} {value}" for heading, value in shared if value and value != "—"]
    return shown, f"All: {', '.join(said)}." if said else ""
