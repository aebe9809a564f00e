"""`hlwq-eval doctor`: what this machine can run, and what is missing."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from evalsuite.cli.app import app
from evalsuite.cli.show import Screen
from evalsuite.core.errors import EvalError
from evalsuite.telemetry.checkup import Finding


@app.command(short_help="What this machine can run, and what is missing.")
def doctor(
    results: Annotated[Path, typer.Option(help="Folder for records.")] = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """What this machine can run: a line each, and the command that mends what is missing."""
    from evalsuite.telemetry.checkup import examine
    from evalsuite.telemetry.machine import read_machine

    screen, found = Screen(as_json), []
    for finding in (*examine(read_machine(), results), *_data()):
        found.append(finding)
        mark = "[green]✓[/]" if finding.ok else "[yellow]–[/]"
        screen.out.print(f"{mark} {finding.name:18}", end=" ")
        screen.out.print(finding.detail, markup=False)
        if finding.remedy:
            screen.out.print(f"{'':21}→ {finding.remedy}", markup=False, style="dim")
    screen.document([asdict(finding) for finding in found])


def _data() -> Iterator[Finding]:
    from evalsuite.data.corpora import DATA_VARIABLE, RAW_FILE, local_wikitext2
    from evalsuite.data.models import DEMO, SMOLLM2, find_checkpoint

    try:
        found = local_wikitext2()
        detail = f"in {DATA_VARIABLE}" if found else f"{DATA_VARIABLE} is not set: it comes from the hub"
        remedy = "" if found else f"without the hub: set {DATA_VARIABLE} to a folder with {RAW_FILE}"
        yield Finding("WikiText-2", found is not None, detail, remedy)
    except EvalError as error:
        yield Finding("WikiText-2", False, error.what, error.todo)
    for model in (DEMO, SMOLLM2):
        try:
            checkpoint = find_checkpoint(model)
            yield Finding(f"model {model}", True, checkpoint.weight_files()[0].name)
        except EvalError as error:
            yield Finding(f"model {model}", False, error.what, error.todo)
