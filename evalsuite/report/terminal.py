"""Tables on a terminal. No number is cut or broken: what does not fit beside it goes on below.

A table that is too wide for its terminal comes in several, one under the other, each with the columns that
say what a row is; or with the rows' numbers, where those columns are too wide themselves. Text is set in
narrower columns first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from evalsuite.report.tables import Column, Table

BORDER, PADDING = 1, 3  # of a table, and of each of its columns
PROSE, LABEL = 13, 18  # columns of text have at least so much, where their words are as long
WHOLE = 16  # other values are not broken up to here


@dataclass(frozen=True)
class _Shown:
    """A column as text.

    Attributes:
        prose: its weight, as in `Column`.
        least, most: characters that it needs at least, and that its cells can use.
    """

    heading: str
    cells: Sequence[str]
    left: bool
    repeated: bool
    prose: int
    least: int
    most: int


@dataclass(frozen=True)
class OnTerminal:
    """A table that Rich prints as wide as there is room for."""

    table: Table[Any]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        table = self.table
        if table.title:
            yield Text(table.title, style="italic")
        columns = _columns(table)
        for group in _groups(columns, len(table.rows), options.max_width):
            yield _rich(group, len(table.rows), options.max_width)
        if table.said:
            yield Text(table.said, style="dim italic")


def _columns(table: Table[Any]) -> list[_Shown]:
    rows = table.cells()
    texts = zip(table.columns, table.headings(), table.left(), strict=True)
    return [
        _column(column, heading, [row[index] for row in rows], left, repeated=column.label or index == 0)
        for index, (column, heading, left) in enumerate(texts)
    ]


def _column(column: Column[Any], heading: str, cells: list[str], left: bool, repeated: bool) -> _Shown:
    words, lines = _longest(" ".join(cells).split()), _longest(_lines(cells))
    if column.prose or repeated:
        least = min(words, PROSE if column.prose else LABEL)
    else:
        least = lines if lines <= WHOLE else words
    least = max(1, least, _longest(heading.split()))
    return _Shown(heading, cells, left, repeated, column.prose, least, max(least, lines))


def _lines(cells: Sequence[str]) -> list[str]:
    return [line for cell in cells for line in cell.splitlines()]


def _longest(texts: Sequence[str]) -> int:
    return max(map(cell_len, texts), default=0)


def _groups(columns: Sequence[_Shown], rows: int, width: int) -> list[list[_Shown]]:
    """Columns that stand side by side; what tells the rows comes first where there are several groups."""
    if _width(columns) <= width:
        return [list(columns)]
    labels = [column for column in columns if column.repeated]
    others = [column for column in columns if not column.repeated]
    if any(column.prose for column in columns) or any(_width([*labels, one]) > width for one in others):
        numbers = [str(row) for row in range(1, rows + 1)]
        labels, others = [_Shown("row", numbers, False, True, 0, 3, 3)], list(columns)
    groups: list[list[_Shown]] = []
    for column in others:
        if not groups or _width([*groups[-1], column]) > width:
            groups.append(list(labels))
        groups[-1].append(column)
    return groups


def _width(columns: Sequence[_Shown]) -> int:
    return BORDER + sum(column.least + PADDING for column in columns)


def _rich(columns: Sequence[_Shown], rows: int, width: int) -> RichTable:
    table = RichTable()
    for column, chosen in zip(columns, _widths(columns, width), strict=True):
        table.add_column(
            Text(column.heading), justify="left" if column.left else "right", overflow="fold", width=chosen
        )
    for row in range(rows):
        table.add_row(*(Text(column.cells[row]) for column in columns))  # Text: brackets are no markup here
    return table


def _widths(columns: Sequence[_Shown], width: int) -> list[int | None]:
    """As much as everything can use, where there is room.

    Else text shares by weight what the others leave it at their least, and those take what is left. None
    leaves it to Rich, where there is too little.
    """
    whole = [max(column.most, cell_len(column.heading)) for column in columns]
    if BORDER + sum(whole) + PADDING * len(whole) <= width:
        return list(whole)
    left = width - _width(columns)
    if left < 0:
        return [None] * len(columns)
    text = [column for column in columns if column.prose]
    widths = iter(_shares(text, left + sum(column.least for column in text)))
    chosen = [next(widths) if column.prose else column.least for column in columns]
    left = width - BORDER - PADDING * len(columns) - sum(chosen)
    wanted = sum(column.most - least for column, least in zip(columns, chosen, strict=True))
    share = min(1.0, left / wanted) if wanted else 0.0
    return [least + int(share * (column.most - least)) for column, least in zip(columns, chosen, strict=True)]


def _shares(text: Sequence[_Shown], room: int) -> list[int]:
    """Of the room by weight, to each what it needs at least, and no more than it can use."""
    chosen: dict[int, int] = {}
    while left := [i for i in range(len(text)) if i not in chosen]:
        total = sum(text[i].prose for i in left)
        share = {i: room * text[i].prose // total for i in left}
        narrow = [i for i in left if share[i] < text[i].least]
        wide = [i for i in left if share[i] > text[i].most]
        for i in narrow or wide or left:
            chosen[i] = min(text[i].most, max(text[i].least, share[i]))
            room -= chosen[i]
    return [chosen[i] for i in range(len(text))]
