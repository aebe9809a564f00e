"""`hlwq-eval run`: an experiment file, from its models to its tables."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from evalsuite.cli.app import app
from evalsuite.cli.choices import (
    EXCLUSIVE,
    GPU_KIND,
    WORKERS,
    Cluster,
    cluster_choice,
    refuse_on_a_cluster,
    require_use,
)
from evalsuite.cli.show import Screen
from evalsuite.core.errors import UsageError


@app.command(short_help="Run an experiment file: an ablation or an evaluation.")
def run(
    experiment: Annotated[Path, typer.Argument(help="An experiment file, such as those in experiments/.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what it would do and take; load no model.")
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Score at most the first so many windows; the table is shown and not kept."),
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Steps of an evaluation to do, by name or command: ppl,speed.")
    ] = None,
    work: Annotated[
        Path, typer.Option(help="Folder for quantized checkpoints and traces; an ablation removes its own.")
    ] = Path("build/experiments"),
    cluster: Cluster = None,
    gpu_kind: Annotated[
        list[str] | None, typer.Option(help=f"{GPU_KIND} Several time every cell on each.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help=f"{WORKERS} They score; cells are timed wherever there is room.")
    ] = None,
    exclusive: Annotated[bool, typer.Option("--exclusive", help=EXCLUSIVE)] = False,
    results: Annotated[Path, typer.Option(help="Folder for records.")] = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Run an experiment file: an ablation of several quantizations, or the steps of an evaluation.

    Whatever is finished is found again: the same command does only what is missing. A step that fails is
    shown, and the others go on. On a cluster, models are scored and timed there, and --work must be a folder
    that every node has under the same path.
    """
    from evalsuite.experiment.evaluation import Evaluation, PerplexityStep, SpeedStep
    from evalsuite.experiment.load import load_experiment

    screen, chosen = Screen(as_json), load_experiment(experiment)
    on = cluster_choice(cluster, {"--gpu-kind": gpu_kind, "--workers": workers, "--exclusive": exclusive})
    if on is not None:
        refuse_on_a_cluster({"--dry-run": dry_run})
    if isinstance(chosen, Evaluation):
        from evalsuite.cli.choices import words
        from evalsuite.cli.evaluation_run import Job

        evaluation = chosen if limit is None else chosen.limited(limit)
        steps = evaluation.chosen(() if only is None else words("--only", only))
        if on is not None:
            require_use(
                on,
                scores=any(isinstance(step, PerplexityStep) for step in steps),
                times=any(isinstance(step, SpeedStep) for step in steps),
            )
        job = Job(evaluation, steps, experiment.stem, results, work, screen, on)
        if dry_run:
            job.show_plan()
        else:
            job.run()
        return
    if only is not None:
        raise UsageError(f"{experiment.name} has arms and no steps.", todo="leave --only out.")
    if limit is not None:
        chosen = chosen.model_copy(update={"limit": limit})
    from evalsuite.cli.ablation_run import run_ablation, show_plan  # slow: after what can be refused at once
    from evalsuite.experiment.ablation_run import Run
    from evalsuite.store.runs import RunStore

    job = Run(chosen, RunStore(results), work)
    if on is not None:
        require_use(on, scores=True, times=False)
        from evalsuite.cluster.perplexity import run_perplexity_on

        job = replace(job, score=partial(run_perplexity_on, on))
    if dry_run:
        show_plan(screen, job)
    else:
        run_ablation(screen, job, None if limit is not None else experiment.stem)
