"""The page: nothing is fetched, nothing is executed that a record says, every number leads to its run."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from evalsuite.report.gallery import Picture
from evalsuite.report.html import data_uri, sort_key, to_html, write_html
from evalsuite.report.section import Section
from evalsuite.report.sections import Report
from evalsuite.report.tables import NOT_MEASURED, Cell, Column, Table
from evalsuite.store.runs import load_runs

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
HOSTILE = "<script>document.title='ran'</script>\"><img src=x onerror=\"document.title='ran'\">"
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def runs():
    found, _ = load_runs(ROOT / "results")
    return tuple([run for run in found if run.record.machine.git_commit][:2])


@pytest.fixture
def report(runs, tmp_path):
    first, second = (run.record.run_id for run in runs)
    rows = [("b", "12.5 ± 0.1", (first,)), ("a", "1,155", (first, second)), (HOSTILE, "−3", (second,))]
    table = Table(
        "Numbers" + HOSTILE,
        (
            Column("model", lambda r: r[0], label=True),
            Column("value", lambda r: Cell(r[1], "derived" if r[0] == "a" else "measured", r[2]), "tok/s", "higher"),
            Column("absent", lambda r: NOT_MEASURED if r[0] == "b" else Cell("7", runs=(first,))),
            *(Column(f"wide column {i}", lambda r: "0.123456789 ± 0.1") for i in range(8)),
        ),
        rows,
        "caption " + HOSTILE,
    )  # fmt: skip
    (tmp_path / "p.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
    (tmp_path / "p.png").write_bytes(b"\x89PNG" + bytes(500))
    picture = Picture("p", "alt " + HOSTILE, "", tmp_path / "p.png", tmp_path / "p.svg")
    sections = (
        Section("headline", "Headline", (table,), (picture,), "note " + HOSTILE),
        Section("provenance", "Provenance", (table,)),
    )
    return Report("A report " + HOSTILE, (Path("results"),), sections, runs, ("left out: " + HOSTILE,))


class Page(HTMLParser):
    """Links, places and everything that a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.links, self.places, self.fetched, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self.places += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if tag == "a" else []
        self.fetched += [found[key] for key in ("src", "srcset", "data", "poster") if key in found]
        self.fetched += [found["href"]] if tag != "a" and "href" in found else []


def test_nothing_is_fetched_and_every_link_has_a_place(report):
    page = Page(to_html(report))
    assert page.fetched
    assert all(source.startswith("data:image/") for source in page.fetched)
    assert len(page.places) == len(set(page.places))
    assert {"headline", "provenance", "runs"} < set(page.places)
    assert {link[1:] for link in page.links} <= set(page.places)
    assert sum(link.startswith("#run-") for link in page.links) == 2 * (4 + 2)  # numbers of both tables
    assert page.tags.count("script") == 1  # its own
    assert page.tags.count("img") == 1


def test_what_a_record_says_is_text(report):
    text = to_html(report)
    assert "<script>document" not in text
    assert "<img src=x" not in text
    assert text.count("&lt;script&gt;document") >= 7  # titles, caption, note, cell, warning, alt


def test_a_run_shows_what_it_takes_to_judge_it(report, runs):
    text = to_html(report)
    for run in runs:
        record = run.record
        for shown in (record.run_id, record.machine.python, record.machine.packages["torch"], record.started):
            assert shown in text
        assert record.machine.git_commit in text


@pytest.mark.parametrize(
    ("cell", "key"),
    [
        (Cell("1,155"), "1155.0"),
        (Cell("3.058 ± 0.086"), "3.058"),
        (Cell("−0.0046 [−0.01, 0.0]"), "-0.0046"),
        (Cell("< 0.001"), "0.001"),
        (Cell("~25"), "25.0"),
        (Cell("2e-5"), "2e-05"),
        (Cell("24.5× faster"), "24.5"),
        (Cell("1,155–1,200"), "1155.0"),
        (Cell("INT4"), "int4"),
        (Cell("2026-11-25T02:11:12 UTC"), "2026-11-25t02:11:12 utc"),
        (Cell("0.26.0"), "0.26.0"),
        (Cell("93e78d87e9b3"), "93e78d87e9b3"),
        (Cell("35b-a3b"), "35b-a3b"),
        (Cell("9.1 s"), "9.1"),
        (Cell("3 min 20 s"), "200.0"),
        (Cell("2 h 05 min"), "7500.0"),
        (Cell("880 MB"), "880000000.0"),
        (Cell("19.4 GB (BF16)"), "19400000000.0"),
        (NOT_MEASURED, ""),
        (Cell("out of memory", "failed"), ""),
    ],
    ids=str,
)
def test_what_a_column_sorts_by(cell, key):
    assert sort_key(cell) == key


def test_the_smaller_form_of_a_picture_is_taken(report, tmp_path):
    picture = report.sections[0].pictures[0]
    assert data_uri(picture).startswith("data:image/svg+xml;base64,")
    picture.svg.write_text("<svg/>" + " " * 2000)
    assert data_uri(picture).startswith("data:image/png;base64,")


def chromium(folder, page, *flags, script=""):
    """The document as the browser has it after the page's own scripts and this one."""
    assert CHROMIUM is not None
    text = page.read_text().replace("</body>", f"<script>{script}</script></body>")
    altered = folder / "altered.html"
    altered.write_text(text)
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, "--dump-dom", altered.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout


def said(dom, name):
    return json.loads(
        re.search(rf"data-{name}='([^']*)'|data-{name}=\"([^\"]*)\"", dom)[2].replace("&quot;", '"')
    )


CLICKS = """
const buttons = document.querySelector("table").querySelectorAll("th button");
const column = (place) => [...document.querySelector("table").tBodies[0].rows].map(row => row.cells[place].innerText.split("\\n")[0].trim());
const seen = {};
for (const [name, place, clicks] of [["up", 1, 1], ["down", 1, 1], ["absent", 2, 1], ["absentdown", 2, 1], ["words", 0, 1]]) {
  for (let i = 0; i < clicks; i++) buttons[place].click();
  seen[name] = column(place).map(text => text.slice(0, 6));
}
seen.sorted = [...document.querySelectorAll("th[aria-sort]")].length;
seen.width = [document.documentElement.scrollWidth, innerWidth];
seen.ground = getComputedStyle(document.body).backgroundColor;
seen.title = document.title;
seen.fetched = performance.getEntriesByType("resource").map(entry => entry.name);
document.body.setAttribute("data-seen", JSON.stringify(seen));
"""


@needs_chromium
def test_tables_sort_and_the_page_never_scrolls_sideways(report, tmp_path):
    write_html(report, tmp_path / "report.html")
    dom = chromium(tmp_path, tmp_path / "report.html", "--window-size=400,800", script=CLICKS)
    seen = said(dom, "seen")
    assert [text[:4] for text in seen["up"]] == ["−3", "12.5", "1,15"]
    assert [text[:4] for text in seen["down"]] == ["1,15", "12.5", "−3"]
    assert seen["absent"][-1] == seen["absentdown"][-1] == "—"  # not measured comes last either way
    assert seen["words"][1:] == ["a", "b"]
    assert seen["sorted"] == 1
    assert seen["width"][0] <= seen["width"][1] <= 500
    assert seen["ground"] == "rgb(255, 255, 255)"
    assert seen["title"].startswith("A report")  # no script of a record ran
    assert all(name.startswith("data:") for name in seen["fetched"])


@needs_chromium
def test_dark_where_the_reader_asks_for_it(report, tmp_path):
    write_html(report, tmp_path / "report.html")
    dom = chromium(tmp_path, tmp_path / "report.html", "--force-dark-mode", script=CLICKS)
    assert said(dom, "seen")["ground"] == "rgb(20, 23, 26)"


@needs_chromium
def test_a_link_to_a_run_opens_it(report, runs, tmp_path):
    write_html(report, tmp_path / "report.html")
    script = (
        "document.querySelector('td a').click();"
        "addEventListener('hashchange', () => document.body.setAttribute('data-open', "
        "JSON.stringify([...document.querySelectorAll('details[open]')].map(place => place.id))));"
    )
    dom = chromium(tmp_path, tmp_path / "report.html", "--virtual-time-budget=2000", script=script)
    opened = said(dom, "open")
    assert len(opened) == 1
    assert opened[0].startswith("run-")


def test_the_template_is_in_the_package():
    assert (ROOT / "evalsuite" / "report" / "templates" / "report.html.j2").is_file()
