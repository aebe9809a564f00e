"""`hlwq-eval cache gc`: remove expert files that no checkpoint needs any more."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from evalsuite.cli.cache import cache_app
from evalsuite.cli.show import Screen
from evalsuite.core.errors import ModelError
from evalsuite.core.units import si_bytes
from evalsuite.data.models import Checkpoint
from evalsuite.experts.files import Entry, cache_folder, entries, in_use, remove
from evalsuite.experts.header import Header
from evalsuite.report.tables import Column, Table


@dataclass(frozen=True)
class Fate:
    """What becomes of a file, and why."""

    entry: Entry
    why: str
    what: str


@cache_app.command()
def gc(
    every: Annotated[
        bool, typer.Option("--all", help="Also those whose checkpoint is there: the next start writes anew.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Of the files; HLWQ_EVAL_CACHE, or ~/.cache/hlwq-eval/experts.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Remove expert files of checkpoints that are gone or changed, and what broken starts left.

    A file that a process uses or writes is kept.
    """
    screen = Screen(as_json)
    place = cache_folder() if folder is None else folder
    fates = [_decide(entry, every, dry_run) for entry in entries(place)]
    if not fates:
        screen.note(f"{place} holds no expert files.")
    else:
        screen.table(_table(place, fates))
    screen.document({"folder": str(place), "files": [_document(fate) for fate in fates]})


def _decide(entry: Entry, every: bool, dry_run: bool) -> Fate:
    why = entry.problem if entry.header is None else _why_useless(entry.header)
    if not why and not every:
        return Fate(entry, "its checkpoint is there", "kept")
    why = why or "asked for by --all"
    if dry_run:
        return Fate(entry, why, "in use, kept" if in_use(entry.path) else "would be removed")
    return Fate(entry, why, "removed" if remove(entry.path) else "in use, kept")


def _why_useless(header: Header) -> str:
    """Empty while the checkpoint that the file was made from lies where it lay, unchanged."""
    source = Path(header.source)
    checkpoint = (
        Checkpoint(header.checkpoint, source.parent, gguf=source.name)
        if source.suffix == ".gguf"
        else Checkpoint(header.checkpoint, source)
    )
    if not source.exists() or not checkpoint.weight_files():
        return "its checkpoint is gone"
    try:
        return (
            ""
            if checkpoint.fingerprint() == header.fingerprint
            else "made from other weights than its checkpoint has"
        )
    except (ModelError, OSError):
        return "its checkpoint cannot be read"


def _table(place: Path, fates: list[Fate]) -> Table[Fate]:
    gone = sum(fate.entry.bytes for fate in fates if "removed" in fate.what)
    return Table(
        f"Expert files in {place}",
        (
            Column[Fate]("file", lambda f: f.entry.path.name[:16]),
            Column[Fate]("checkpoint", lambda f: f.entry.header.checkpoint if f.entry.header else "unknown"),
            Column[Fate]("on the disk", lambda f: si_bytes(f.entry.bytes)),
            Column[Fate]("why", lambda f: f.why),
            Column[Fate]("fate", lambda f: f.what),
        ),
        fates,
        f"{si_bytes(gone)} {'can be freed' if any('would' in f.what for f in fates) else 'freed'}.",
    )


def _document(fate: Fate) -> dict[str, Any]:
    header = fate.entry.header
    return {
        "path": str(fate.entry.path),
        "bytes": fate.entry.bytes,
        "checkpoint": header.checkpoint if header else None,
        "fingerprint": header.fingerprint if header else None,
        "why": fate.why,
        "fate": fate.what,
    }
