"""`hlwq-eval compare`: two finished perplexity runs, paired by window."""

from pathlib import Path
from typing import Annotated

import typer

from evalsuite.cli.app import app
from evalsuite.cli.show import Screen


@app.command(short_help="Two perplexity runs, paired by window.")
def compare(
    baseline: Annotated[str, typer.Argument(help="A finished run: its folder or id.")],
    candidate: Annotated[str, typer.Argument(help="A finished run: its folder or id.")],
    results: Annotated[Path, typer.Option(help="Folder with records.")] = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Δ ln PPL with interval and p-value; divergence and agreement where both runs kept hidden states."""
    from evalsuite.core.record import CompareResult
    from evalsuite.report.perplexity import compare_table
    from evalsuite.run.perplexity import run_compare
    from evalsuite.store.runs import RunStore

    screen, store = Screen(as_json), RunStore(results)
    with screen.progress() as progress:
        finished = run_compare(store.find(baseline), store.find(candidate), store, progress)
    assert isinstance(finished.record.results, CompareResult)
    screen.table(compare_table(finished.record.results))
    screen.note(f"record: {finished.path}")
    screen.document({"path": str(finished.path), **finished.record.model_dump(mode="json")})
