"""Declared tables, rendered to the terminal, Markdown, CSV, LaTeX and JSON from one source.

`Table.grid` is that source: what HTML or anything else shows is made from its cells.
"""

import csv
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

from evalsuite.report.markup import latex_text, markdown_text

Row = TypeVar("Row")
Origin = Literal["measured", "derived", "claimed", "failed", "not measured"]
MARKS: dict[Origin, str] = {
    "measured": "",
    "derived": " (derived)",
    "claimed": " (claimed)",
    "failed": "",
    "not measured": "",
}


@dataclass(frozen=True)
class Cell:
    """Text, where it comes from, and the ids of the runs that it comes from.

    What was not measured shows a dash; what was tried and failed shows how it ended.
    """

    text: str
    origin: Origin = "measured"
    runs: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "—" if self.origin == "not measured" else self.text + MARKS[self.origin]


NOT_MEASURED = Cell("", "not measured")


@dataclass(frozen=True)
class Column(Generic[Row]):
    """One column: its title, how a row fills it, its unit, and which direction is better.

    A column with `prose` holds text, set from the left. In the terminal such columns share the width that the
    others leave, in the proportion of these numbers. A `label` says what the row is, not what was found: it
    comes from no run.
    """

    title: str
    get: Callable[[Row], Cell | str]
    unit: str = ""
    better: Literal["lower", "higher"] | None = None
    prose: int = 0
    label: bool = False

    @property
    def heading(self) -> str:
        arrow = {"lower": " ↓", "higher": " ↑", None: ""}[self.better]
        return self.title + (f" [{self.unit}]" if self.unit else "") + arrow


@dataclass(frozen=True)
class Table(Generic[Row]):
    """Columns over rows, with a caption that holds what all rows share.

    `runs` gives the ids of the runs that a row's numbers come from, where the cells do not say it themselves.
    """

    title: str
    columns: Sequence[Column[Row]]
    rows: Sequence[Row]
    caption: str = ""
    runs: Callable[[Row], Sequence[str]] | None = None

    @property
    def said(self) -> str:
        """The caption in one line."""
        return " ".join(self.caption.split())

    def headings(self) -> list[str]:
        """What stands over each column: where all its cells are derived, or claimed, that is said here."""
        return self._texts()[0]

    def cells(self) -> list[list[str]]:
        """The text of every cell, with its mark where the heading does not have it."""
        return self._texts()[1]

    def _texts(self) -> tuple[list[str], list[list[str]]]:
        grid = self.grid()
        headings: list[str] = []
        marked: list[str] = []
        for index, column in enumerate(self.columns):
            marks = {MARKS[row[index].origin] for row in grid if row[index].origin != "not measured"}
            mark = marks.pop() if len(marks) == 1 else ""
            headings.append(column.heading + mark)
            marked.append(mark)
        rows = [
            [cell.text if mark and cell.text else str(cell) for cell, mark in zip(row, marked, strict=True)]
            for row in grid
        ]
        return headings, rows

    def names(self) -> list[str]:
        """The headings, the second of two equal ones with its number: keys for machines."""
        seen: Counter[str] = Counter()
        found: list[str] = []
        for heading in self.headings():
            seen[heading] += 1
            found.append(heading if seen[heading] == 1 else f"{heading} ({seen[heading]})")
        return found

    def grid(self) -> list[list[Cell]]:
        """Every cell, row by row, with the runs it comes from; labels and dashes come from none."""
        return [[self._cell(column, row) for column in self.columns] for row in self.rows]

    def _cell(self, column: Column[Row], row: Row) -> Cell:
        got = column.get(row)
        cell = Cell(got) if isinstance(got, str) else got
        if cell.runs or self.runs is None or column.label or cell.origin in ("claimed", "not measured"):
            return cell
        return replace(cell, runs=tuple(self.runs(row)))

    def to_markdown(self) -> str:
        def line(values: Sequence[str]) -> str:
            return "| " + " | ".join(map(markdown_text, values)) + " |"

        rule = "|" + "|".join(" --- " if left else " ---: " for left in self.left()) + "|"
        headings, rows = self._texts()
        lines = [line(headings), rule, *map(line, rows)]
        return "\n".join(lines) + (f"\n\n{markdown_text(self.said)}" if self.caption else "")

    def to_csv(self) -> str:
        """A line of headings and a line a row; a last column names the runs, where there are any."""
        grid, texts = self.grid(), self.cells()
        named = any(cell.runs for row in grid for cell in row)
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([*self.names(), *(["runs"] if named else [])])
        for row, shown in zip(grid, texts, strict=True):
            runs = dict.fromkeys(run for cell in row for run in cell.runs)
            writer.writerow([*map(_one_line, shown), *([" ".join(runs)] if named else [])])
        return out.getvalue()

    def to_latex(self) -> str:
        """A ``table`` for the package booktabs, in ASCII but for letters that names hold."""

        def line(values: Sequence[str]) -> str:
            return " & ".join(map(latex_text, values)) + r" \\"

        headings, rows = self._texts()
        lines = [
            "% needs \\usepackage{booktabs}",
            r"\begin{table}",
            rf"\caption{{{latex_text(f'{self.title}. {self.said}'.strip())}}}",
            r"\begin{tabular}{" + "".join("l" if left else "r" for left in self.left()) + "}",
            r"\toprule",
            line(headings),
            r"\midrule",
            *map(line, rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"

    def to_json(self) -> list[dict[str, Any]]:
        """A row a dictionary: heading to text, origin and runs. The text of what was not measured is null."""
        names = self.names()
        return [
            {
                heading: {
                    "text": None if cell.origin == "not measured" else cell.text,
                    "origin": cell.origin,
                    "runs": list(cell.runs),
                }
                for heading, cell in zip(names, row, strict=True)
            }
            for row in self.grid()
        ]

    def left(self) -> list[bool]:
        """Which columns are set from the left."""
        return [i == 0 or c.prose > 0 or c.label for i, c in enumerate(self.columns)]


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())
