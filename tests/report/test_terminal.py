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


def test_labels_that_leave_no_room_give_way_to_row_numbers():
    names = ["model", "mode", "store", "routing", "device", "concurrency", "decode", "bound"]
    rows = [["qwen3.5-35b-a3b-int4", "graphs", "pinned", "uniform random", "NVIDIA H200", str(n), "97.498 ± 0.330", "1,646"]
            for n in (1, 8)]  # fmt: skip
    shown = lines(table(rows, names, labels=6), 60)
    assert max(map(len, shown)) <= 60
    cells = [cell for row in cells_of(shown) for cell in row]
    assert cells.count("97.498 ± 0.330") == 2
    assert cells.count("1,646") == 2
    assert sum(line.startswith("┏") for line in shown) > 1


def test_text_beside_many_columns_is_kept():
    rows = [["a", *(f"{n}.5 ± 0.1" for n in range(8)), "why it is so"]]
    shown = lines(table(rows, ["name", *(f"x{n}" for n in range(8)), "why"], prose=(9,)), 46)
    cells = " ".join(cell for row in cells_of(shown) for cell in row)
    assert all(f"{n}.5 ± 0.1" in cells for n in range(8))
    assert "why it is so" in cells


@pytest.mark.parametrize("width", [12, 20, 30])
def test_nothing_is_lost_where_there_is_no_room(width):
    shown = lines(table([["a-long-name-of-a-model", "123456.789 ± 0.123"]], ["model", "perplexity"]), width)
    found = "".join("".join(row[-1].split()) for row in cells_of(shown))
    assert found == "a-long-name-of-a-model123456.789±0.123"
