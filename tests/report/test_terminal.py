"""Tables as a terminal of some width shows them."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from evalsuite.report.tables import Column, Table
from evalsuite.report.terminal import OnTerminal


def lines(table, width):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(OnTerminal(table))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def cells_of(shown):
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown if "│" in line]


def table(rows, titles, labels=1, prose=(), caption=""):
    columns = [
        Column(title, lambda r, i=i: r[i], label=i < labels, prose=(i in prose) and 1)
        for i, title in enumerate(titles)
    ]
    return Table("a title", columns, rows, caption)


@given(st.data(), st.integers(45, 200), st.integers(1, 14))
def test_every_number_is_whole_beside_its_label(data, width, count):
    number = st.from_regex(r"[0-9]{1,5}\.[0-9]{1,3} ± [0-9]\.[0-9]", fullmatch=True)
    rows = [
        [f"row-{n}", *data.draw(st.lists(number, min_size=count, max_size=count))]
        for n in range(data.draw(st.integers(1, 4)))
    ]
    shown = lines(table(rows, ["name", *(f"quantity {n} [unit]" for n in range(count))]), width)
    assert max(map(len, shown)) <= width
    found = {name: [] for name, *_ in rows}
    for name, *values in cells_of(shown):
        found[name] += values
    assert found == {name: values for name, *values in rows}


def test_a_table_that_fits_is_one():
    shown = lines(table([["a", "1", "2"]], ["name", "x", "y"], caption="said once"), 80)
    assert [line for line in shown if line.startswith("┏")] == ["┏━━━━━━┳━━━┳━━━┓"]
    assert (shown[0], shown[-1]) == ("a title", "said once")


def test_text_is_set_narrower_and_its_table_stays_one():
    why = "a reason that takes more words than a line has room for, and then some"
    shown = lines(table([["a", "12,345,678", why, why]], ["name", "count", "why", "how"], prose=(2, 3)), 60)
    assert sum(line.startswith("┏") for line in shown) == 1
    assert max(map(len, shown)) <= 60
    rows = cells_of(shown)
    assert [row[1] for row in rows if row[1]] == ["12,345,678"]
    assert " ".join(row[2] for row in rows).split() == why.split()


@pytest.mark.parametrize("width", [12, 20, 30])
def test_nothing_is_lost_where_there_is_no_room(width):
    shown = lines(table([["a-long-name-of-a-model", "123456.789 ± 0.123"]], ["model", "perplexity"]), width)
    rows = cells_of(shown)
    assert "".join(row[0] for row in rows) == "a-long-name-of-a-model"
    assert "".join("".join(row[1].split()) for row in rows) == "123456.789±0.123"
