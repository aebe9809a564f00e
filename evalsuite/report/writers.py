"""A report on disk.

::

    OUT/REPORT.md                  every section; pictures by relative links
    OUT/report.html                the same in one file
    OUT/tables/SECTION-TITLE.csv   a file a table, also as .tex and .json
    OUT/figures/NAME.png           and .svg
    OUT/runs.csv, runs.parquet     all records as one tidy table
    OUT/lm-eval/MODEL.json         perplexities as lm-evaluation-harness writes them, a file a model

All of it follows from the records and is written anew; nothing is removed that is not.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evalsuite.core.record import Record
from evalsuite.data.models import slug
from evalsuite.report.export import to_frame
from evalsuite.report.html import write_html
from evalsuite.report.lm_eval import lm_eval_results
from evalsuite.report.markup import markdown_text
from evalsuite.report.section import Section
from evalsuite.report.sections import Report
from evalsuite.report.tables import Table
from evalsuite.store.derived import AGAIN, write_derived
from evalsuite.store.folder import storage_errors

FORMATS = ("md", "csv", "tex", "json", "html", "png", "svg")
FIGURES = "figures"


def figures_folder(out: Path, formats: Sequence[str]) -> Path | None:
    """Where pictures are drawn; None where no format shows any."""
    return out / FIGURES if {"png", "svg", "html"} & set(formats) else None


def write_report(report: Report, out: Path, formats: Sequence[str]) -> list[Path]:
    """Write the forms asked for; the files that were written.

    Args:
        report: its pictures drawn into `figures_folder`.
        formats: of FORMATS.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    with storage_errors(out, AGAIN):
        out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    if "md" in formats:
        written.append(write_derived(out / "REPORT.md", to_markdown(report, formats)))
    if "html" in formats:
        write_html(report, out / "report.html")
        written.append(out / "report.html")
    written += _tables(report, out / "tables", formats)
    pictures = [picture for section in report.sections for picture in section.pictures]
    for picture in pictures:
        for path in (picture.png, picture.svg):
            if path.suffix[1:] in formats:
                written.append(path)
            else:
                path.unlink(missing_ok=True)  # drawn beside the one that was asked for
    frame = to_frame(report.records)
    if "csv" in formats:
        written.append(write_derived(out / "runs.csv", frame.to_csv(index=False)))
        with storage_errors(out, AGAIN):
            frame.to_parquet(out / "runs.parquet")
        written.append(out / "runs.parquet")
    if "json" in formats:
        written += _lm_eval(report.records, out / "lm-eval")
    return written


def to_markdown(report: Report, formats: Sequence[str]) -> str:
    """The whole report; pictures are linked in the form that was asked for, PNG before SVG."""
    suffix = next((form for form in ("png", "svg") if form in formats), None)
    lines = [f"# {markdown_text(report.title)}", ""]
    if report.warnings:
        lines += [*(f"- **Note:** {markdown_text(warning)}" for warning in report.warnings), ""]
    lines += [*(f"- [{markdown_text(s.title)}](#{s.anchor})" for s in report.sections), ""]
    for section in report.sections:
        lines += section_markdown(section, FIGURES, suffix)
    return "\n".join(lines).rstrip() + "\n"


def section_markdown(section: Section, figures: str, suffix: str | None) -> list[str]:
    """The lines of a section.

    Args:
        figures: folder of the pictures, relative to the file.
        suffix: form of the pictures; None leaves them out.
    """
    lines = [f'<a id="{section.anchor}"></a>', f"## {markdown_text(section.title)}", ""]
    if section.note:
        lines += [markdown_text(section.note), ""]
    for table in section.tables:
        lines += [f"### {markdown_text(table.title)}", "", table.to_markdown(), ""]
    for picture in section.pictures if suffix is not None else ():
        alt = markdown_text(picture.alt).replace("[", "\\[").replace("]", "\\]")
        lines += [f"![{alt}]({figures}/{picture.name}.{suffix})", ""]
    return lines


def to_document(report: Report) -> dict[str, Any]:
    """The report as plain values: sections, tables with origin and runs of every cell, pictures, warnings."""
    return {
        "title": report.title,
        "folders": [str(folder) for folder in report.folders],
        "warnings": list(report.warnings),
        "sections": [
            {
                "anchor": section.anchor,
                "title": section.title,
                "note": section.note,
                "tables": [table_document(table) for table in section.tables],
                "pictures": [
                    {"name": picture.name, "alt": picture.alt, "caption": picture.caption}
                    for picture in section.pictures
                ],
            }
            for section in report.sections
        ],
        "runs": [record.run_id for record in report.records],
    }


def table_document(table: Table[Any]) -> dict[str, Any]:
    return {"title": table.title, "caption": table.said, "rows": table.to_json()}


def _tables(report: Report, folder: Path, formats: Sequence[str]) -> list[Path]:
    forms: dict[str, Callable[[Table[Any]], str]] = {
        "csv": lambda table: table.to_csv(),
        "tex": lambda table: table.to_latex(),
        "json": lambda table: _json(table_document(table)),
    }
    chosen = {form: write for form, write in forms.items() if form in formats}
    if not chosen:
        return []
    with storage_errors(folder, AGAIN):
        folder.mkdir(exist_ok=True)
    return [
        write_derived(folder / f"{name}.{form}", write(table))
        for name, table in table_names(report.sections)
        for form, write in chosen.items()
    ]


def table_names(sections: Sequence[Section]) -> list[tuple[str, Table[Any]]]:
    """Every table with a file name of its own."""
    found: list[tuple[str, Table[Any]]] = []
    used: set[str] = set()
    for section in sections:
        for table in section.tables:
            title = re.sub(r"[^a-z0-9]+", "-", table.title.lower()).strip("-")
            stem = title if title.startswith(section.anchor) else f"{section.anchor}-{title}"
            name, count = stem, 1
            while name in used:
                count += 1
                name = f"{stem}-{count}"
            used.add(name)
            found.append((name, table))
    return found


def _lm_eval(records: Sequence[Record], folder: Path) -> list[Path]:
    by_model: dict[str, list[Record]] = {}
    for record in records:
        if record.kind == "ppl" and record.status == "ok" and record.model is not None:
            by_model.setdefault(record.model.fingerprint, []).append(record)
    if not by_model:
        return []
    with storage_errors(folder, AGAIN):
        folder.mkdir(exist_ok=True)
    written: list[Path] = []
    names: set[str] = set()
    for fingerprint, mine in by_model.items():
        assert mine[0].model is not None
        name = slug(mine[0].model.name)
        if name in names:  # another checkpoint of the same name
            name = f"{name}-{fingerprint[:8]}"
        names.add(name)
        written.append(write_derived(folder / f"{name}.json", _json(lm_eval_results(mine))))
    return written


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
