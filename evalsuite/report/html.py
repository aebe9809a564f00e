"""A report as one HTML file: nothing is fetched, so it reads the same offline and years from now.

Every number links to the run that it comes from, whose machine, versions and request lie at the end of the
page. Tables sort by a click; without scripts the page reads as it stands.
"""

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from evalsuite.core.record import Record
from evalsuite.core.units import si_bytes
from evalsuite.report.gallery import Picture
from evalsuite.report.sections import Report
from evalsuite.report.tables import Cell, Table
from evalsuite.store.derived import AGAIN, write_derived
from evalsuite.store.folder import storage_errors
from evalsuite.store.runs import StoredRun

FOLDED = ("provenance",)  # sections that a reader opens when a number is in doubt
ARROW = re.compile(r" (?=[↑↓])")  # stays with what it points at
LONG = 14  # letters
# not the first digits of a date, a version, a hash or a name
NUMBER = re.compile(r"[−-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.:-])")
MEASURE = re.compile(rf"({NUMBER.pattern}) (TB|GB|MB|kB|B|h|min|s|ms|µs)\b ?")
SIZES = {
    "TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0, "h": 3600.0, "min": 60.0, "s": 1.0, "ms": 1e-3,
    "µs": 1e-6,
}  # fmt: skip


@dataclass(frozen=True)
class PageCell:
    """A cell as the page shows it.

    Attributes:
        key: what its column sorts by, a number or, for words, the words; what was not measured comes last.
        links: of each run that it comes from, the id and the place on the page.
    """

    text: str
    origin: str
    key: str
    links: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class PageTable:
    """A table as the page shows it; `kinds` are the style classes of its columns, such as ``words``."""

    title: str
    caption: str
    headings: Sequence[str]
    kinds: Sequence[str]
    rows: Sequence[Sequence[PageCell]]


@dataclass(frozen=True)
class PageRun:
    """A run at the end of the page: facts as pairs, and its request as JSON."""

    anchor: str
    run_id: str
    title: str
    status: str
    facts: Sequence[tuple[str, str]]
    spec: str


def write_html(report: Report, path: Path) -> None:
    """Write the page.

    Raises:
        StorageError: the disk is full, the folder cannot be written, or a picture is gone.
    """
    write_derived(path, to_html(report))


def to_html(report: Report) -> str:
    """The page as text.

    Raises:
        StorageError: a picture is gone.
    """
    anchors = {run.record.run_id: anchor_of(run.record.run_id) for run in report.runs}
    sections = [
        {
            "anchor": section.anchor,
            "title": section.title,
            "note": section.note,
            "folded": section.anchor in FOLDED,
            "tables": [page_table(table, anchors) for table in section.tables],
            "pictures": [(picture, data_uri(picture)) for picture in section.pictures],
        }
        for section in report.sections
    ]
    template = _environment().get_template("report.html.j2")
    return template.render(
        report=report, sections=sections, runs=[page_run(run, anchors) for run in report.runs]
    )


def page_table(table: Table[Any], anchors: dict[str, str]) -> PageTable:
    """A table with its links.

    Args:
        anchors: place on the page of each run; others are left without a link.
    """
    rows = [
        [_cell(cell, text, anchors) for cell, text in zip(cells, texts, strict=True)]
        for cells, texts in zip(table.grid(), table.cells(), strict=True)
    ]
    kinds = [
        _kind([row[index].text for row in rows]) if index == 0 or column.prose or column.label else ""
        for index, column in enumerate(table.columns)
    ]
    headings = [ARROW.sub("\u00a0", heading) for heading in table.headings()]
    return PageTable(table.title, table.said, headings, kinds, rows)


def _kind(texts: Sequence[str]) -> str:
    """Of a column of words; long ones may break, and are given room."""
    return "words long" if max(map(len, texts), default=0) > LONG else "words"


def _cell(cell: Cell, text: str, anchors: dict[str, str]) -> PageCell:
    links = tuple((run, anchors[run]) for run in dict.fromkeys(cell.runs) if run in anchors)
    return PageCell(text, cell.origin.replace(" ", "-"), sort_key(cell), links)


def sort_key(cell: Cell) -> str:
    """The number that a cell begins with; its words where it has none; nothing where it was not measured.

    Where a unit of size or time follows, the number is in bytes or seconds, and 2 h 05 min is one.
    """
    if cell.origin in ("not measured", "failed"):
        return ""
    text, total, place = cell.text.lstrip("~≥≤<>+ "), 0.0, 0
    while part := MEASURE.match(text, place):
        total, place = total + _number(part[1]) * SIZES[part[2]], part.end()
    if place:
        return repr(total)
    found = NUMBER.match(text)
    return repr(_number(found[0])) if found else cell.text.casefold()


def _number(text: str) -> float:
    return float(text.replace(",", "").replace("−", "-"))


def page_run(run: StoredRun, anchors: dict[str, str]) -> PageRun:
    """What is known of a run besides its numbers."""
    record = run.record
    return PageRun(
        anchors[record.run_id],
        record.run_id,
        f"{record.kind} of {record.run_id.partition('/')[0]}",
        record.status,
        [(name, value) for name, value in _facts(record) if value],
        json.dumps(record.spec, indent=1, ensure_ascii=False),
    )


def _facts(record: Record) -> list[tuple[str, str]]:
    machine, model, text = record.machine, record.model, record.text
    gpus = ", ".join(f"{gpu.name} ({si_bytes(gpu.memory_bytes)})" for gpu in machine.gpus)
    commit = record.machine.git_commit or ""
    return [
        ("started", record.started),
        ("finished", record.finished),
        ("protocol", record.protocol.describe() if record.protocol else ""),
        ("text", f"{text.corpus}, sha256 {text.sha256[:16]}, {text.tokens:,} tokens" if text else ""),
        ("tokenizer", f"{text.tokenizer}, sha256 {text.tokenizer_sha256[:16]}" if text else ""),
        ("weights", f"{model.stored}, fingerprint {model.fingerprint[:16]}" if model else ""),
        ("computed", f"{model.computed} ({model.device_name})" if model else ""),
        ("machine", f"{machine.platform}, {machine.cpu}, {machine.cpu_cores} cores, {_ram(record)}"),
        ("GPUs", gpus),
        ("driver", " ".join(filter(None, (machine.gpu_driver, machine.cuda and f"CUDA {machine.cuda}")))),
        ("versions", ", ".join(f"{name} {v}" for name, v in machine.packages.items())),
        ("Python", machine.python),
        ("commit", commit + (" with changes" if commit and machine.git_dirty else "")),
        ("engaged", ", ".join(f"{name}: {_plain(value)}" for name, value in record.engaged.items())),
        ("notes", "; ".join(record.warnings)),
        ("error", record.error or ""),
        ("files", ", ".join(record.files)),
    ]


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _ram(record: Record) -> str:
    return f"{si_bytes(record.machine.ram_bytes)} of memory"


def anchor_of(run_id: str) -> str:
    """A place on the page for a run; ids differ in more than their folder's name."""
    return "run-" + re.sub(r"[^A-Za-z0-9._-]+", "-", run_id)


def data_uri(picture: Picture) -> str:
    """The picture in the smaller of its two forms.

    Raises:
        StorageError: it is gone.
    """
    with storage_errors(picture.svg, AGAIN):
        svg, png = picture.svg.read_bytes(), picture.png.read_bytes()
    kind, data = ("svg+xml", svg) if len(svg) <= len(png) else ("png", png)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("evalsuite.report"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
