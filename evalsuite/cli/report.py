"""`hlwq-eval report`: records into tables, pictures and files; or the difference of two folders."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evalsuite.cli.app import app
from evalsuite.cli.show import Screen
from evalsuite.core.errors import UsageError

if TYPE_CHECKING:
    from evalsuite.report.sections import Report

ALL_FORMATS = "md,csv,tex,json,html,png,svg"


@app.command(short_help="Tables and pictures of all records.")
def report(
    results: Annotated[
        list[Path] | None, typer.Argument(help="Folders with records.", show_default="results")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Only runs of this model; may be given several times.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where files go; the first folder's report/ if not given. With --diff nothing is written "
            "without it.",
            show_default=False,
        ),
    ] = None,
    formats: Annotated[str, typer.Option(help="Of these, with commas between them.")] = ALL_FORMATS,
    claims: Annotated[
        Path | None,
        typer.Option(help="A claims file: what a card claims, held against the records.", show_default=False),
    ] = None,
    diff: Annotated[
        bool, typer.Option("--diff", help="Take two folders, OLD and NEW, and show what changed.")
    ] = False,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LIMIT",
            help="With --diff, exit 1 where a metric changed by more than LIMIT, such as 'ppl>+1%' or "
            "'decode_tok_s<-5%'. A change counts when its whole 95 % interval lies beyond the limit, and "
            "its value where it has no interval: noise fails no build. Exit 1 also where a run no longer "
            "succeeds, or where a limit cannot be checked: a run of OLD that has the metric is missing in "
            "NEW, was measured there on another text or tokenizer, or lost the metric; or a record of NEW "
            "cannot be read. An unknown metric is answered with the list of all.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Tables and pictures of all records, in every form; or what changed between two folders.

    Needs no GPU. Runs stand beside each other only where they may be compared.
    """
    folders = results or [Path("results")]
    screen = Screen(as_json)
    if diff:
        from evalsuite.cli.report_diff import show_difference

        if formats != ALL_FORMATS or claims is not None:
            raise UsageError(
                "--formats and --claims are for the tables and pictures of a report.",
                todo="with --diff, --out writes DIFFERENCE.md and difference.json.",
            )
        show_difference(screen, folders, model or (), fail_on or (), out)
        return
    if fail_on:
        raise UsageError(
            "--fail-on looks at changes, and there is one folder to look at.",
            todo="give two folders and --diff: hlwq-eval report OLD NEW --diff --fail-on 'ppl>+1%'.",
        )
    make_report(screen, folders, _formats(formats), models=model or (), out=out, claims=claims)


def make_report(
    screen: Screen,
    folders: list[Path],
    formats: tuple[str, ...],
    *,
    models: Sequence[str] = (),
    out: Path | None = None,
    claims: Path | None = None,
) -> None:
    """Write the report of these folders, and show its first tables; with claims, the first of those.

    Args:
        models: only runs of these; all where none is named.
        out: the first folder's ``report`` where it is None.
        claims: a claims file to hold against the records.
    """
    from evalsuite.report.sections import build_report
    from evalsuite.report.writers import figures_folder, to_document, write_report

    place = out or folders[0] / "report"
    if place.exists() and not place.is_dir():
        raise UsageError(f"{place} is a file.", todo="name a folder with --out.")
    screen.note("reading records and drawing pictures …")
    figures = figures_folder(place, formats)
    made = build_report(folders, models=models, figures=figures, claims=claims)
    written = write_report(made, place, formats)
    _show(screen, made, place, written)
    screen.document({**to_document(made), "written": [str(path) for path in written]})


def _show(screen: Screen, made: "Report", place: Path, written: list[Path]) -> None:
    claims = made.section("claims")
    shown = claims.tables[:1] if claims else (made.section("headline") or made.sections[0]).tables
    for table in shown:
        screen.table(table)
    if claims:
        screen.note(f"{claims.title}: {claims.note}")
    for warning in made.warnings:
        screen.warn(warning)
    tables = sum(len(section.tables) for section in made.sections)
    pictures = sum(len(section.pictures) for section in made.sections)
    screen.note(
        f"{len(made.runs)} runs, {len(made.sections)} sections, {tables} tables, {pictures} pictures; "
        f"{len(written)} files in {place}"
    )
    for name in ("REPORT.md", "report.html"):
        if place / name in written:
            screen.note(f"read: {place / name}")


def _formats(text: str) -> tuple[str, ...]:
    from evalsuite.report.writers import FORMATS

    asked = [part.strip() for part in text.split(",")]
    if unknown := [part for part in asked if part not in FORMATS]:
        raise UsageError(
            f"There is no format {unknown[0]!r}.", todo=f"choose from {', '.join(FORMATS)}, with commas."
        )
    return tuple(dict.fromkeys(asked))
