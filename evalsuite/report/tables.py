"""Declared tables, rendered to the terminal and to Markdown from one source."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from rich.table import Table as RichTable
from rich.text import Text

Row = TypeVar("Row")
Origin = Literal["measured", "derived", "claimed", "not measured"]
MARKS: dict[Origin, str] = {
    "measured": "",
    "derived": " (derived)",
    "claimed": " (claimed)",
    "not measured": "",
}


@dataclass(frozen=True)
class Cell:
    """Text and where it comes from; what was not measured shows a dash."""

    text: str
    origin: Origin = "measured"

    def __str__(self) -> str:
        return "—" if self.origin == "not measured" else self.text + MARKS[self.origin]


NOT_MEASURED = Cell("", "not measured")


@dataclass(frozen=True)
class Column(Generic[Row]):
    """One column: its title, how a row fills it, its unit, and which direction is better.

    A column with `prose` holds text, set from the left. In the terminal such columns share the width that the
    others leave, in the proportion of these numbers.
    """

    title: str
    get: Callable[[Row], Cell | str]
    unit: str = ""
    better: Literal["lower", "higher"] | None = None
    prose: int = 0

    @property
    def heading(self) -> str:
        arrow = {"lower": " ↓", "higher": " ↑", None: ""}[self.better]
        return self.title + (f" [{self.unit}]" if self.unit else "") + arrow


@dataclass(frozen=True)
class Table(Generic[Row]):
    """Columns over rows, with a caption that holds what all rows share."""

    title: str
    columns: Sequence[Column[Row]]
    rows: Sequence[Row]
    caption: str = ""

    def cells(self) -> list[list[str]]:
        return [[str(column.get(row)) for column in self.columns] for row in self.rows]

    def to_rich(self) -> RichTable:
        table = RichTable(
            title=Text(self.title),
            caption=Text(self.caption),
            title_justify="left",
            caption_justify="left",
            expand=any(column.prose for column in self.columns),
        )
        for index, column in enumerate(self.columns):
            left = index == 0 or column.prose
            table.add_column(
                Text(column.heading),
                justify="left" if left else "right",
                overflow="fold" if column.prose else "ellipsis",
                ratio=column.prose or None,
            )
        for row in self.cells():
            table.add_row(*map(Text, row))  # Text, not str: brackets and :names: are no markup here
        return table

    def to_markdown(self) -> str:
        def line(values: Sequence[str]) -> str:
            return "| " + " | ".join(map(_plain, values)) + " |"

        rules = (" --- " if i == 0 or c.prose else " ---: " for i, c in enumerate(self.columns))
        rule = "|" + "|".join(rules) + "|"
        rows = [line([c.heading for c in self.columns]), rule, *map(line, self.cells())]
        return "\n".join(rows) + (f"\n\n{_plain(self.caption)}" if self.caption else "")


# what Markdown would take for markup; underscores inside words, brackets and "p < 0.001" are none
_MARKUP = re.compile(r"[\\|*`]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|<(?=[A-Za-z/!?])|&(?=#?\w+;)|(?<=\])\(")


def _plain(text: str) -> str:
    return _MARKUP.sub(r"\\\g<0>", " ".join(text.splitlines()))
