"""What `report --diff` does: two folders, their changes, and an exit code for whoever builds on it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from evalsuite.cli.show import Screen
from evalsuite.core.errors import UsageError
from evalsuite.report.difference import (
    Difference,
    by_pair,
    changes_tables,
    difference,
    telling,
    unmatched_table,
)
from evalsuite.report.limits import Limit, parse_limit
from evalsuite.report.markup import markdown_text
from evalsuite.report.sections import nothing_there, of_models, read_folders
from evalsuite.report.writers import table_document
from evalsuite.store.derived import AGAIN, write_derived
from evalsuite.store.folder import storage_errors


def show_difference(
    screen: Screen, folders: Sequence[Path], models: Sequence[str], fail_on: Sequence[str], out: Path | None
) -> None:
    """Compare, show, and exit with 1 where a limit is crossed or a run that succeeded no longer does.

    Args:
        out: folder for DIFFERENCE.md, which has every metric, and difference.json; None writes neither.

    Raises:
        UsageError: there are not two folders, a limit does not parse, or no matched runs have its metric.
    """
    if len(folders) != 2:
        raise UsageError(
            f"--diff compares two folders, and {len(folders)} were named.",
            todo="hlwq-eval report OLD NEW --diff.",
        )
    limits = [parse_limit(text) for text in fail_on]
    (all_old, skipped_old), (all_new, skipped_new) = (read_folders([folder]) for folder in folders)
    old, new = of_models(all_old, models), of_models(all_new, models)
    for folder, runs, skipped in ((folders[0], old, skipped_old), (folders[1], new, skipped_new)):
        if not runs:
            raise nothing_there([folder], models, skipped)
    found = difference(old, new, sides=(*all_old, *all_new))
    for limit in limits:
        if not any(change.metric is limit.metric for change in found.changes) and not found.broken:
            raise UsageError(
                f"--fail-on {limit.text!r} looks at nothing.",
                cause="no runs that both folders have, under the same conditions, have that metric.",
                todo="run the same commands for both folders; the table of `--diff` alone says what differs.",
            )
    if found.changes:
        shown = telling(found.changes, limits)
        for table in changes_tables(shown, limits):
            screen.table(table)
        pairs, told = len(by_pair(found.changes)), len(by_pair(shown))
        screen.note(
            f"{pairs} pairs of runs, {told} of them changed beyond an interval; --json has every metric"
        )
    else:
        screen.note("No run of one folder can be compared with a run of the other.")
    if found.unmatched:
        screen.table(unmatched_table(found.unmatched))
    for warning in (*skipped_old, *skipped_new):
        screen.warn(warning)
    crossed = found.crossed(limits)
    for change, limit in crossed:
        screen.error.print(
            f"{limit.text} is crossed by {change.new.record.run_id}", markup=False, style="red"
        )
    broken = found.broken if limits else []
    for one in broken:
        screen.error.print(f"{one.run.record.run_id}: {one.why}", markup=False, style="red")
    whole = document(found, limits, (*skipped_old, *skipped_new))
    if out is not None:
        for path in write_difference(found, limits, f"{folders[1]} against {folders[0]}", whole, out):
            screen.note(f"written: {path}")
    screen.document(whole)
    if crossed or broken:
        raise typer.Exit(1)


def write_difference(
    found: Difference, limits: Sequence[Limit], title: str, whole: dict[str, Any], out: Path
) -> list[Path]:
    """The difference as Markdown and as JSON."""
    with storage_errors(out, AGAIN):
        out.mkdir(parents=True, exist_ok=True)
    tables = [
        *changes_tables(found.changes, limits),
        *([unmatched_table(found.unmatched)] if found.unmatched else []),
    ]
    parts = [f"## {markdown_text(table.title)}\n\n{table.to_markdown()}\n" for table in tables]
    text = "\n".join((f"# {markdown_text(title)}\n", *parts))
    return [
        write_derived(out / "DIFFERENCE.md", text),
        write_derived(out / "difference.json", json.dumps(whole, indent=1, allow_nan=False) + "\n"),
    ]


def document(found: Difference, limits: Sequence[Limit], warnings: Sequence[str]) -> dict[str, Any]:
    """The difference as plain values; changes are shares of the old value where `relative` is true."""
    return {
        "changes": [
            {
                "metric": change.metric.name,
                "unit": change.metric.unit,
                "old": change.before.value,
                "new": change.after.value,
                "relative": change.relative is not None,
                "change": change.shift.value,
                "low": change.shift.low,
                "high": change.shift.high,
                "crossed": [limit.text for limit in change.crossed(limits)],
                "runs": [change.old.record.run_id, change.new.record.run_id],
            }
            for change in found.changes
        ],
        "not_compared": [
            {"run": one.run.record.run_id, "why": one.why, "broke": one.broke} for one in found.unmatched
        ],
        "tables": [table_document(table) for table in changes_tables(found.changes, limits)],
        "warnings": list(warnings),
    }
