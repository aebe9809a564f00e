"""Tables: declared once, rendered twice, with nothing in a cell taken for markup."""

import io
import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from evalsuite.report.tables import NOT_MEASURED, Cell, Column, Table

Row = tuple[Cell | str, ...]


def table(rows: Sequence[Row], titles: Sequence[str] = ("name", "value"), **options: str) -> Table[Row]:
    columns = [Column[Row](title, lambda r, i=i: r[i]) for i, title in enumerate(titles)]
    return Table("a title", columns, rows, **options)


def on_a_terminal(shown: Table[Row]) -> str:
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(shown.to_rich())
    return console.file.getvalue()  # type: ignore[attr-defined]


def parsed(markdown: str) -> tuple[list[list[str]], str]:
    """Cells and caption as a reader of GitHub sees them: the text that is left once markup is applied."""

    def plain(inline: str) -> str:
        return "".join(
            t.content if t.type == "text" else f"<{t.type}>" for t in inline.children if t.type != "softbreak"
        )  # type: ignore[attr-defined]

    rows: list[list[str]] = []
    caption, in_table = "", False
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        if token.type in ("table_open", "table_close"):
            in_table = token.type == "table_open"
        elif token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and in_table:
            rows[-1].append(plain(token))  # type: ignore[arg-type]
        elif token.type == "inline":
            caption += plain(token)  # type: ignore[arg-type]
    return rows, caption


# names that users have: files, folders, hub ids, prose
NAMES = (
    "Qwen/Qwen3.5-0.8B", "a|b", "||", "a\\|b", "file:__init__.py", "file:*.txt", "hf*", "x*y*z", "`code`",
    "<b>", "a_b_c", "_x_", "[link](http://x)", "p < 0.001", "6.56 [6.38, 6.75]", "200–500", "&amp;", "#1",
    "~~x~~", "C:\\models\\", "Δ ln PPL", "—",
)  # fmt: skip


class TestMarkdown:
    def test_a_whole_table(self):
        columns = [
            Column[Row]("name", lambda r: r[0]),
            Column[Row]("perplexity", lambda r: r[1], better="lower"),
            Column[Row]("rate", lambda r: r[2], unit="tok/s", better="higher"),
        ]
        rows = [("a", "6.56", Cell("12", "derived")), ("b", Cell("7", "claimed"), NOT_MEASURED)]
        assert Table("t", columns, rows, "A caption.").to_markdown() == (
            "| name | perplexity ↓ | rate [tok/s] ↑ |\n"
            "| --- | ---: | ---: |\n"
            "| a | 6.56 | 12 (derived) |\n"
            "| b | 7 (claimed) | — |\n"
            "\n"
            "A caption."
        )

    def test_without_rows_and_caption(self):
        assert table([]).to_markdown() == "| name | value |\n| --- | ---: |"

    @pytest.mark.parametrize("name", NAMES)
    def test_a_name_comes_out_as_it_went_in(self, name: str):
        rows, _ = parsed(table([(name, "1"), ("next", name)]).to_markdown())
        assert rows == [["name", "value"], [name, "1"], ["next", name]]

    @pytest.mark.parametrize("name", ["a|b", "file:__init__.py"])
    def test_a_heading_comes_out_as_it_went_in(self, name: str):
        rows, _ = parsed(table([("1", "2")], titles=(name, "value")).to_markdown())
        assert rows[0] == [name, "value"]

    def test_a_caption_comes_out_as_it_went_in(self):
        caption = "card-1155: last 256 scored; 9 tokens with the tokenizer of file:__init__.py."
        assert parsed(table([("1", "2")], caption=caption).to_markdown())[1] == caption

    def test_a_line_break_does_not_end_the_row(self):
        rows, _ = parsed(table([("one\ntwo", "1"), ("x", "2")]).to_markdown())
        assert len(rows) == 3
        assert rows[2] == ["x", "2"]

    @given(
        st.lists(st.tuples(st.text("ab|\\ ", max_size=6), st.text("ab|", max_size=4)), min_size=1, max_size=4)
    )
    def test_a_row_has_as_many_cells_as_the_heading(self, rows: list[tuple[str, str]]):
        lines = table(rows).to_markdown().split("\n")
        assert len(lines) == 2 + len(rows)
        for line in lines:
            # GitHub's cell rule: a backslash takes the next character with it
            assert len(re.findall(r"(?:\\.|[^\\|])*\|", line)) == 3, line


class TestTerminal:
    @pytest.mark.parametrize(
        "name", [*NAMES, "[bold]x[/bold]", "[/]", "[red]", "\\[x]", "a\\", "model:rocket:v2"]
    )
    def test_a_name_comes_out_as_it_went_in(self, name: str):
        assert name in on_a_terminal(table([(name, "1")]))
        assert name in on_a_terminal(table([("1", "2")], titles=(name, "value")))
        wide = "a cell wider than any of the names, which keeps the caption on one line"
        assert name in on_a_terminal(table([(wide, "2")], caption=name))

    def test_what_was_not_measured_shows_a_dash(self):
        shown = on_a_terminal(table([("kl", NOT_MEASURED), ("ppl", Cell("6.56", "claimed"))]))
        assert re.search(r"kl\s*│\s*—", shown)
        assert "6.56 (claimed)" in shown

    def test_units_are_not_markup(self):
        columns = [Column[Row]("rate", lambda r: r[0], unit="b", better="higher")]
        assert "rate [b] ↑" in on_a_terminal(Table("t", columns, [("1",)]))


def test_both_forms_hold_the_same_cells():
    shown = table([("a", "1"), ("b", NOT_MEASURED)])
    text = on_a_terminal(shown)
    rows, _ = parsed(shown.to_markdown())
    assert rows[1:] == shown.cells() == [["a", "1"], ["b", "—"]]
    for row in rows:
        for cell in row:
            assert cell in text


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (Cell("5"), "5"),
        (Cell("5", "derived"), "5 (derived)"),
        (Cell("5", "claimed"), "5 (claimed)"),
        (Cell("5", "not measured"), "—"),
        (NOT_MEASURED, "—"),
    ],
)
def test_a_cell_shows_where_it_comes_from(cell: Cell, text: str):
    assert str(cell) == text
