"""`hlwq-eval run`: an experiment file, from its checkpoints to its one table."""

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from evalsuite.cli.app import app
from evalsuite.cli.choices import GPU_KIND, WORKERS, Cluster, cluster_choice
from evalsuite.cli.show import Screen


@app.command()
def run(
    experiment: Annotated[Path, typer.Argument(help="An experiment file, such as those in experiments/.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what it would do; load no model.")] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Score only the first so many windows, whatever the file says.")
    ] = None,
    work: Annotated[
        Path, typer.Option(help="Folder for the quantized checkpoints, which are removed once scored.")
    ] = Path("build/experiments"),
    cluster: Cluster = None,
    gpu_kind: Annotated[str | None, typer.Option(help=GPU_KIND)] = None,
    workers: Annotated[int | None, typer.Option(min=1, help=WORKERS)] = None,
    results: Annotated[Path, typer.Option(help="Folder for records.")] = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Quantize a model in several ways, score each against the unquantized one, and show one table.

    Whatever is finished is found again: the same command does only what is missing. On a cluster the arms are
    scored there, and the --work folder must be one that every node has under the same path.
    """
    from evalsuite.experiment import Run, load_experiment
    from evalsuite.report.experiment import experiment_table, plan_table
    from evalsuite.store.runs import RunStore

    screen, chosen = Screen(as_json), load_experiment(experiment)
    if limit is not None:
        chosen = chosen.model_copy(update={"limit": limit})
    on = cluster_choice(cluster, {"--gpu-kind": gpu_kind and [gpu_kind], "--workers": workers})
    job = Run(chosen, RunStore(results), work)
    if on is not None:
        from evalsuite.cluster.perplexity import run_perplexity_on

        job = replace(job, score=partial(run_perplexity_on, on))
    if dry_run:
        arms, windows = job.plan()
        screen.table(plan_table(chosen.question, arms, windows, chosen.windows.describe()))
        screen.document({"windows": windows, "arms": [arm.as_dict() for arm in arms]})
        return
    with ExitStack() as stack:
        rows, baseline = job.run(_Steps(screen, stack))
    table = experiment_table(chosen.question, rows, baseline.record)
    screen.table(table)
    written = results / f"{experiment.stem}.md"
    written.write_text(f"# {table.title}\n\n{table.to_markdown()}\n", encoding="utf-8")
    screen.note(f"table: {written}")
    screen.document([row.as_dict() for row in rows])


class _Steps:
    """A display for each step in turn; the last one's is put away when the next begins."""

    def __init__(self, screen: Screen, stack: ExitStack) -> None:
        self._screen, self._stack = screen, stack

    def scoring(self, step: str) -> Any:
        self._next(step)
        return self._stack.enter_context(self._screen.progress())

    def quantizing(self, step: str) -> Any:
        self._next(step)
        return self._stack.enter_context(self._screen.quantizing())

    def _next(self, step: str) -> None:
        self._stack.pop_all().close()
        self._screen.note(step)
