"""A whole report: sections with tables and pictures, from the records of results folders.

A section is one subject. Runs that must not be compared, such as perplexities under different protocols,
stand in tables of their own inside it. Everything that is shown comes from here; writers turn it into
Markdown, HTML or files, and add nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evalsuite.core.errors import UsageError
from evalsuite.core.record import QuantizeResult, Record
from evalsuite.report.perplexity import runs_table
from evalsuite.report.tables import Table
from evalsuite.store.runs import StoredRun, load_runs


@dataclass(frozen=True)
class Picture:
    """A picture as PNG and as SVG.

    Attributes:
        name: file name without suffix.
        alt: what it shows, for who cannot see it.
        caption: how strong its conclusion is; it stands in the picture too.
    """

    name: str
    alt: str
    caption: str
    png: Path
    svg: Path


@dataclass(frozen=True)
class Section:
    """One subject of a report.

    Attributes:
        anchor: lower-case letters, digits and hyphens, unique in a report.
        note: a sentence for the reader, plain text.
    """

    anchor: str
    title: str
    tables: tuple[Table[Any], ...] = ()
    pictures: tuple[Picture, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Report:
    """Sections, the runs that they come from, newest first, and what was left out or is to be known.

    Attributes:
        folders: the results folders, as they were given.
    """

    title: str
    folders: tuple[Path, ...]
    sections: tuple[Section, ...]
    runs: tuple[StoredRun, ...]
    warnings: tuple[str, ...]

    @property
    def records(self) -> tuple[Record, ...]:
        return tuple(run.record for run in self.runs)

    def section(self, anchor: str) -> Section | None:
        """The section of that anchor; None where no run gave one."""
        return next((section for section in self.sections if section.anchor == anchor), None)


def build_report(
    folders: Sequence[Path], *, models: Sequence[str] = (), figures: Path | None = None
) -> Report:
    """Everything that the records of these folders show.

    Args:
        models: only runs of models of these names; all where there are none.
        figures: folder for the pictures, which is made; None draws none.

    Raises:
        UsageError: a folder is not there, or holds no run of these models.
    """
    runs: list[StoredRun] = []
    warnings: list[str] = []
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"There is no folder {folder}.", todo="name the folder that holds the records.")
        found, left_out = load_runs(folder)
        runs += (run for run in found if not models or not models_of(run.record).isdisjoint(models))
        warnings += (f"left out: {reason}" for reason in left_out)
    where = ", ".join(map(str, folders))
    if not runs:
        of = f" of {' or '.join(models)}" if models else ""
        raise UsageError(
            f"{where} holds no finished run{of}.",
            cause="; ".join(warnings),
            todo="measure something first, such as `hlwq-eval ppl`, or name another folder.",
        )
    if figures is not None:
        figures.mkdir(parents=True, exist_ok=True)
    return Report(f"Measurements in {where}", tuple(folders), sections(runs), tuple(runs), tuple(warnings))


def models_of(record: Record) -> set[str]:
    """Names of the models that a run is about; of a quantization, its source and its destination."""
    if isinstance(record.results, QuantizeResult):
        return {record.results.source, record.results.destination}
    return {record.model.name} if record.model else {str(record.spec.get("model", ""))}


def sections(runs: Sequence[StoredRun]) -> tuple[Section, ...]:
    """The sections that these runs are enough for."""
    scored = [run.record for run in runs if run.record.kind == "ppl" and run.record.status == "ok"]
    return (Section("perplexity", "Perplexity", (runs_table(scored),)),) if scored else ()
