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
from evalsuite.report.surroundings import sentence
from evalsuite.report.writers import table_document
from evalsuite.store.derived import AGAIN, write_derived
from evalsuite.store.folder import storage_errors


def show_difference(
    screen: Screen, folders: Sequence[Path], models: Sequence[str], fail_on: Sequence[str], out: Path | None
) -> None:
    """Compare, show, and exit with 1 where a limit is crossed or a run that succeeded no longer does.

    So do limits that cannot be checked, as what they are on was measured before and is no longer there.

    Args:
        out: folder for DIFFERENCE.md, which has every metric, and difference.json; None writes neither.

    Raises:
        UsageError: there are not two folders, a limit does not parse, or no old run has its metric.
    """
    if len(folders) != 2:
        raise UsageError(
            f"--diff compares two folders, and {len(folders)} were named.",
            todo="hlwq-eval report OLD NEW --diff.",
        )
    limits = [parse_limit(text) for text in fail_on]
    (all_old, skipped_old), (all_new, skipped_new) = (read_folders([folder]) for folder in folders)
    old, new = of_models(all_old, models), of_models(all_new, models)
    if not old:
        raise nothing_there(folders[:1], models, skipped_old)
    if not new and not limits:
        raise nothing_there(folders[1:], models, skipped_new)
    found = difference(old, new, sides=(*all_old, *all_new))
    looked_at = {change.metric.name for change in found.changes}
    looked_at |= {limit.metric.name for limit, _, _ in found.unchecked(limits)}
    for limit in limits:
        if limit.metric.name not in looked_at and not found.broken and not skipped_new:
            raise UsageError(
                f"--fail-on {limit.text!r} looks at nothing.",
                cause="no run of the old folder that succeeded has that metric.",
                todo="measure it there first; the table of `--diff` alone says what there is.",
            )
    if found.changes:
        shown = telling(found.changes, limits)
        for table in changes_tables(shown, limits, found.names):
            screen.table(table)
        pairs, told = len(by_pair(found.changes)), len(by_pair(shown))
        screen.note(
            f"{pairs} pairs of runs, {told} of them changed beyond an interval; --json has every metric"
        )
        if around := sentence(found.surroundings, len(found.pairs)):
            screen.warn(around)
    else:
        screen.note("No run of one folder can be compared with a run of the other.")
    if found.unmatched:
        screen.table(unmatched_table(found.unmatched, found.names))
    failures = found.failures(limits)
    if limits:
        failures += (f"no limit can be checked for a run that was {warning}" for warning in skipped_new)
    for warning in (*skipped_old, *([] if limits else skipped_new)):
        screen.warn(warning)
    for failure in failures:
        screen.error.print(failure, markup=False, style="red")
    whole = document(found, limits, failures, (*skipped_old, *skipped_new))
    if out is not None:
        title = f"{folders[1]} against {folders[0]}"
        for path in write_difference(found, limits, failures, title, whole, out):
            screen.note(f"written: {path}")
    screen.document(whole)
    if failures:
        raise typer.Exit(1)


def write_difference(
    found: Difference,
    limits: Sequence[Limit],
    failures: Sequence[str],
    title: str,
    whole: dict[str, Any],
    out: Path,
) -> list[Path]:
    """The difference as Markdown and as JSON."""
    with storage_errors(out, AGAIN):
        out.mkdir(parents=True, exist_ok=True)
    tables = [
        *changes_tables(found.changes, limits, found.names),
        *([unmatched_table(found.unmatched, found.names)] if found.unmatched else []),
    ]
    parts: list[str] = []
    if failures:
        parts.append("## What fails\n\n" + "".join(f"- {markdown_text(failure)}\n" for failure in failures))
    if around := sentence(found.surroundings, len(found.pairs)):
        parts.append(f"{markdown_text(around)}\n")
    parts += [f"## {markdown_text(table.title)}\n\n{table.to_markdown()}\n" for table in tables]
    text = "\n".join((f"# {markdown_text(title)}\n", *parts))
    return [
        write_derived(out / "DIFFERENCE.md", text),
        write_derived(out / "difference.json", json.dumps(whole, indent=1, allow_nan=False) + "\n"),
    ]


def document(
    found: Difference, limits: Sequence[Limit], failures: Sequence[str], warnings: Sequence[str]
) -> dict[str, Any]:
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
        "surroundings": [
            {"name": one.name, "old": one.old, "new": one.new, "pairs": one.pairs}
            for one in found.surroundings
        ],
        "tables": [table_document(table) for table in changes_tables(found.changes, limits, found.names)],
        "failures": list(failures),
        "warnings": list(warnings),
    }
