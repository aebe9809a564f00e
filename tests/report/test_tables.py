"""Tables: declared once, rendered twice, with nothing in a cell taken for markup."""

import csv
import io
import json
import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from evalsuite.report.tables import NOT_MEASURED, Cell, Column, Table
from evalsuite.report.terminal import OnTerminal

Row = tuple[Cell | str, ...]


def table(rows: Sequence[Row], titles: Sequence[str] = ("name", "value"), **options: str) -> Table[Row]:
    columns = [Column[Row](title, lambda r, i=i: r[i]) for i, title in enumerate(titles)]
    return Table("a title", columns, rows, **options)


def on_a_terminal(shown: Table[Row]) -> str:
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(OnTerminal(shown))
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

ANY = st.characters(exclude_categories=("Cs",), exclude_characters="\0")


class TestMarkdown:
    def test_a_whole_table(self):
        columns = [
            Column[Row]("name", lambda r: r[0]),
            Column[Row]("perplexity", lambda r: r[1], better="lower"),
            Column[Row]("rate", lambda r: r[2], unit="tok/s", better="higher"),
        ]
        rows = [("a", "6.56", Cell("12", "derived")), ("b", Cell("7", "claimed"), NOT_MEASURED)]
        assert Table("t", columns, rows, "A  caption.").to_markdown() == (
            "| name | perplexity ↓ | rate [tok/s] ↑ (derived) |\n"
            "| --- | ---: | ---: |\n"
            "| a | 6.56 | 12 |\n"
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
        shown = on_a_terminal(table([("kl", NOT_MEASURED), ("ppl", Cell("6.56", "claimed")), ("x", "1")]))
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


class TestOrigin:
    ROWS = (("a", Cell("1", "derived")), ("b", NOT_MEASURED), ("c", Cell("2", "derived")))

    def test_a_column_of_one_origin_says_so_once(self):
        shown = table(self.ROWS)
        assert shown.headings() == ["name", "value (derived)"]
        assert shown.cells() == [["a", "1"], ["b", "—"], ["c", "2"]]

    def test_a_column_of_several_says_so_in_each_cell(self):
        shown = table([*self.ROWS, ("d", "3")])
        assert shown.headings() == ["name", "value"]
        assert [row[1] for row in shown.cells()] == ["1 (derived)", "—", "2 (derived)", "3"]

    def test_what_failed_shows_how(self):
        assert table([("a", Cell("out of memory", "failed")), ("b", "1")]).cells()[0][1] == "out of memory"


class TestRuns:
    def columns(self) -> list[Column[Row]]:
        return [
            Column("name", lambda r: r[0], label=True),
            Column("value", lambda r: r[1]),
        ]

    def test_a_number_comes_from_its_rows_runs(self):
        rows = [("a", "1"), ("b", NOT_MEASURED), ("c", Cell("3", "claimed")), ("d", Cell("4", runs=("x",)))]
        shown = Table("t", self.columns(), rows, runs=lambda r: (f"run-{r[0]}",))
        assert [row[1].runs for row in shown.grid()] == [("run-a",), (), (), ("x",)]
        assert not any(row[0].runs for row in shown.grid()), "a label comes from no run"
        assert shown.to_csv().splitlines()[:2] == ["name,value,runs", "a,1,run-a"]

    def test_without_runs_there_is_no_column_of_them(self):
        assert Table("t", self.columns(), [("a", "1")]).to_csv() == "name,value\na,1\n"


class TestCsv:
    @given(st.lists(st.tuples(st.text(ANY, max_size=8), st.text(ANY, max_size=8)), min_size=1, max_size=4))
    def test_every_text_comes_back_in_one_line(self, rows: list[tuple[str, str]]):
        text = table(rows).to_csv()
        expected = [[" ".join(cell.splitlines()) for cell in row] for row in rows]
        assert list(csv.reader(io.StringIO(text, newline=""))) == [["name", "value"], *expected]

    @pytest.mark.parametrize("name", [*NAMES, 'say "x"', "a,b"])
    def test_names(self, name: str):
        assert list(csv.reader(io.StringIO(table([(name, "1")]).to_csv())))[1] == [name, "1"]


class TestJson:
    def test_text_origin_and_runs(self):
        shown = Table(
            "t", [Column[Row]("v", lambda r: r[0], "GB", "lower")], [("1",), (NOT_MEASURED,)],
            runs=lambda r: ("a/b",),
        )  # fmt: skip
        assert json.loads(json.dumps(shown.to_json())) == [
            {"v [GB] ↓": {"text": "1", "origin": "measured", "runs": ["a/b"]}},
            {"v [GB] ↓": {"text": None, "origin": "not measured", "runs": []}},
        ]

    def test_equal_headings_stay_two_keys(self):
        assert list(table([("1", "2")], titles=("moved", "moved")).to_json()[0]) == ["moved", "moved (2)"]


class TestLatex:
    def test_a_whole_table(self):
        text = Table(
            "A & B",
            [Column[Row]("name", lambda r: r[0]), Column[Row]("rate", lambda r: r[1], "tok/s", "higher")],
            [("a_b", "6.56 ± 0.09"), ("50 %", NOT_MEASURED)],
            "Half.",
        ).to_latex()
        assert text == (
            "% needs \\usepackage{booktabs}\n"
            "\\begin{table}\n"
            "\\caption{A \\& B. Half.}\n"
            "\\begin{tabular}{lr}\n"
            "\\toprule\n"
            "name & rate {[}tok/s{]} $\\uparrow$ \\\\\n"
            "\\midrule\n"
            "a\\_b & 6.56 $\\pm$ 0.09 \\\\\n"
            "50 \\% & --- \\\\\n"
            "\\bottomrule\n"
            "\\end{tabular}\n"
            "\\end{table}\n"
        )

    @given(st.text('ab%_&#${}~^\\<>|"\n ', max_size=12))
    def test_a_row_has_as_many_cells_as_the_heading(self, name: str):
        line = table([(name, "1")]).to_latex().splitlines()[7]
        unescaped = re.sub(r"\\[A-Za-z]+(\{\})?|\\.", "", line.removesuffix(r" \\"))
        assert unescaped.count("&") == 1, "one separator is left"
        assert not re.search(r"[%_#$~^|<>]", unescaped.replace("{[}", "").replace("{]}", ""))
        assert unescaped.count("{") == unescaped.count("}")
