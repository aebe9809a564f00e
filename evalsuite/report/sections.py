"""A whole report: sections with tables and pictures, from the records of results folders.

A section is one subject. Runs that must not be compared, such as perplexities under different protocols,
stand in tables of their own inside it. Everything that is shown comes from here; writers turn it into
Markdown, HTML or files, and add nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evalsuite.core.errors import UsageError
from evalsuite.core.record import QuantizeResult, Record
from evalsuite.report.claim_tables import claim_tables, summary
from evalsuite.report.claim_verdicts import judge
from evalsuite.report.claimed_speed import claimed_speed_table, one_sequence
from evalsuite.report.claims import Claims, load_claims
from evalsuite.report.gallery import Gallery
from evalsuite.report.section import Section
from evalsuite.report.subjects import sections
from evalsuite.store.runs import StoredRun, load_runs


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


def load_folders(
    folders: Sequence[Path], models: Sequence[str] = ()
) -> tuple[list[StoredRun], tuple[str, ...]]:
    """Finished runs of these models, kind by kind, newest first; and why others were left out.

    Raises:
        UsageError: a folder is not there, or there is no such run.
    """
    runs, warnings = read_folders(folders)
    chosen = of_models(runs, models)
    if not chosen:
        raise nothing_there(folders, models, warnings)
    return chosen, warnings


def nothing_there(folders: Sequence[Path], models: Sequence[str], warnings: Sequence[str]) -> UsageError:
    of = f" of {' or '.join(models)}" if models else ""
    of_a_model = next((folder for folder in folders if any(folder.glob("*/run.json"))), None)
    if of_a_model is not None:
        return UsageError(
            f"{of_a_model} holds the runs of one model, and no folder for each model.",
            todo=f"give {of_a_model.resolve().parent} with --model {of_a_model.resolve().name}.",
        )
    return UsageError(
        f"{', '.join(map(str, folders))} holds no finished run{of} that can be read.",
        cause="; ".join(warnings),
        todo="measure something first, such as `hlwq-eval ppl`, or name another folder.",
    )


def read_folders(folders: Sequence[Path]) -> tuple[list[StoredRun], tuple[str, ...]]:
    """All finished runs, kind by kind, newest first; and why others were left out.

    Raises:
        UsageError: a folder is not there.
    """
    runs: list[StoredRun] = []
    warnings: list[str] = []
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"There is no folder {folder}.", todo="name the folder that holds the records.")
        found, left_out = load_runs(folder)
        known = {run.path.resolve() for run in runs}  # a folder may be named twice
        runs += (run for run in found if run.path.resolve() not in known)
        warnings += (f"left out: {reason}" for reason in left_out)
    runs.sort(key=lambda run: (run.record.kind, run.record.started), reverse=True)
    return runs, tuple(warnings)


def of_models(runs: Sequence[StoredRun], models: Sequence[str]) -> list[StoredRun]:
    """The runs that are about one of these models; all where none is named."""
    return [run for run in runs if not models or not models_of(run.record).isdisjoint(models)]


def models_of(record: Record) -> set[str]:
    """Names of the models that a run is about; of a quantization, its source and its destination."""
    if isinstance(record.results, QuantizeResult):
        return {record.results.source, record.results.destination}
    names = {record.run_id.partition("/")[0]}
    return names | {record.model.name} if record.model else names


def build_report(
    folders: Sequence[Path],
    *,
    models: Sequence[str] = (),
    figures: Path | None = None,
    claims: Path | None = None,
) -> Report:
    """Everything that the records of these folders show.

    Args:
        models: only runs of models of these names; all where there are none.
        figures: folder for the pictures, which is made; None draws none.
        claims: a claims file, which is held against the records in a section before all others.

    Raises:
        UsageError: a folder is not there, or holds no run of these models; or the claims file cannot be read.
    """
    held = None if claims is None else load_claims(claims)
    runs, warnings = load_folders(folders, models)
    gallery = Gallery(figures)
    made = sections(runs, gallery)
    if held is not None:
        made = (claims_section(held, runs), *made)
    where = ", ".join(map(str, folders))
    return Report(
        f"Measurements in {where}", tuple(folders), made, tuple(runs), (*warnings, *gallery.warnings)
    )


def claims_section(claims: Claims, runs: Sequence[StoredRun]) -> Section:
    """What a published card claims, held against these runs.

    Args:
        runs: newest first.
    """
    judged = judge(claims, [run.record for run in runs])
    speeds = claimed_speed_table(claims, one_sequence(runs))
    return Section(
        "claims",
        f"Claims of {claims.card.title}",
        (*([speeds] if speeds.rows else []), *claim_tables(claims, judged)),
        note=summary(judged),
    )
