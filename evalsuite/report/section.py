"""One subject of a report."""

from dataclasses import dataclass
from typing import Any

from evalsuite.report.gallery import Picture
from evalsuite.report.tables import Table


@dataclass(frozen=True)
class Section:
    """One subject of a report.

    Attributes:
        anchor: lower-case letters, digits and hyphens, unique in a report.
        note: a sentence for the reader, plain text.
    """

    anchor: str
    title: str
    tables: tuple[Table[Any], ...] = ()
    pictures: tuple[Picture, ...] = ()
    note: str = ""
