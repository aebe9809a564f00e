"""What `run` does with an evaluation: its plan, or its steps one after the other, and what became of them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from evalsuite.cli.cache_run import make_trace, run_simulation
from evalsuite.cli.card import write_card
from evalsuite.cli.check import check_claims
from evalsuite.cli.footprint_run import watch_model
from evalsuite.cli.perplexity_run import measure as measure_perplexity
from evalsuite.cli.quantize import quantize_model
from evalsuite.cli.report import make_report
from evalsuite.cli.show import Screen
from evalsuite.cli.speed_run import LiveSweep, Place
from evalsuite.cli.speed_run import measure as measure_speed
from evalsuite.cluster.connect import ClusterChoice
from evalsuite.core.errors import EvalError, MeasurementError, ModelError, UsageError
from evalsuite.core.spec import PerplexitySpec, QuantizeSpec
from evalsuite.core.units import si_bytes
from evalsuite.data.models import find_checkpoint
from evalsuite.engines.bandwidth import measure_bandwidth
from evalsuite.experiment.evaluation import (
    CacheStep,
    CardStep,
    CheckStep,
    Evaluation,
    FootprintStep,
    FromRecords,
    PerplexityStep,
    QuantizeStep,
    ReportStep,
    SpeedStep,
    Step,
    name_of,
)
from evalsuite.experiment.models import Models
from evalsuite.experiment.plan import Planner
from evalsuite.experiment.quantized import slug_of
from evalsuite.experiment.traces import trace_folder
from evalsuite.report.card import CardRequest
from evalsuite.report.claims import load_claims
from evalsuite.report.evaluation import (
    PlannedCell,
    PlannedModel,
    StepOutcome,
    models_table,
    outcome_table,
    plan_table,
    refusal_table,
)
from evalsuite.run.resume import finished_scores
from evalsuite.run.trace import TRACE_FILE
from evalsuite.store.derived import AGAIN, write_derived
from evalsuite.store.folder import storage_errors
from evalsuite.store.runs import RunStore
from evalsuite.telemetry.gpu import count_visible
from evalsuite.telemetry.machine import read_machine


@dataclass(frozen=True)
class Plan:
    """What is to be done, and what of it this machine cannot do."""

    models: list[PlannedModel]
    cells: dict[str, list[PlannedCell]]


class Quiet(Screen):
    """The terminal of a step: its document is kept for the evaluation's own."""

    def __init__(self, as_json: bool) -> None:
        super().__init__(as_json)
        self.kept: Any = None

    def document(self, value: Any) -> None:
        self.kept = value


@dataclass
class Job:
    """An evaluation with its places.

    Attributes:
        name: of the file that lists what became of the steps.
        steps: those of the file that were asked for.
        cluster: where perplexity and speed are measured; None measures here.
    """

    evaluation: Evaluation
    steps: Sequence[Step]
    name: str
    results: Path
    work: Path
    screen: Screen
    cluster: ClusterChoice | None = None
    _models: Models = field(init=False)

    def __post_init__(self) -> None:
        self._models = Models(self.evaluation, self.work)

    def show_plan(self) -> None:
        """What every step will take; nothing is loaded, downloaded or written."""
        plan = self._plan(measure_bandwidth)
        cells = [cell for found in plan.cells.values() for cell in found]
        machine = read_machine()
        self.screen.table(models_table(self.evaluation.question, plan.models))
        if cells:
            gpus = ", ".join(gpu.name for gpu in machine.gpus)
            self.screen.table(plan_table(cells, gpus or f"this machine without a GPU ({machine.cpu})"))
        if refused := refusal_table(cells):
            self.screen.table(refused)
        others = [name_of(step) for step in self.steps if isinstance(step, FromRecords)]
        if others:
            self.screen.note(f"then, from records alone: {', '.join(others)}")
        self.screen.document(
            {
                "models": [model.as_dict() for model in plan.models],
                "cells": [cell.as_dict() for cell in cells],
                "steps": [name_of(step) for step in self.steps],
            }
        )

    def run(self) -> None:
        """Do every step, whatever becomes of the others.

        Raises:
            UsageError: a step names a file that is not there, or the disk is too small; nothing ran.
            MeasurementError: a step failed; all others are done.
        """
        plan = self._plan(None)
        _refuse_full_disks(plan.models)
        outcomes: list[StepOutcome] = []
        documents: dict[str, Any] = {}
        for number, step in enumerate(self.steps, 1):
            name = name_of(step)
            self.screen.note(f"── {number} of {len(self.steps)}: {name}")
            quiet = Quiet(self.screen.as_json)
            outcomes.append(self._outcome(step, plan.cells[name], quiet))
            documents[name] = quiet.kept
        table = outcome_table(self.evaluation.question, outcomes)
        self.screen.table(table)
        if len(self.steps) == len(self.evaluation.steps):  # a part does not stand for the whole
            with storage_errors(self.results, AGAIN):
                self.results.mkdir(parents=True, exist_ok=True)
            written = write_derived(
                self.results / f"{self.name}.md", f"# {table.title}\n\n{table.to_markdown()}\n"
            )
            self.screen.note(f"steps: {written}")
        self.screen.document([one.as_dict() | {"document": documents[one.step]} for one in outcomes])
        failed = [one.step for one in outcomes if one.status != "ok"]
        if failed:
            raise MeasurementError(
                f"{len(failed)} of {len(outcomes)} steps failed: {', '.join(failed)}.",
                todo="read the table of them above; the same command does what is missing.",
            )

    def _plan(self, bandwidth_of: Callable[[int | None], Any] | None) -> Plan:
        for step in self.steps:
            if isinstance(step, CheckStep | ReportStep) and step.claims:
                load_claims(Path(step.claims))
        with TemporaryDirectory(prefix="hlwq-eval-") as scratch:
            subjects = self._models.before(Path(scratch))
            planner = Planner(
                self.evaluation, subjects, RunStore(self.results), self.work, read_machine(), bandwidth_of
            )
            cells = {name_of(step): planner.cells(step) for step in self.steps}
        return Plan([subject.planned for subject in subjects.values()], cells)

    def _outcome(self, step: Step, cells: Sequence[PlannedCell], screen: Screen) -> StepOutcome:
        name, start = name_of(step), time.monotonic()
        refused = list(dict.fromkeys(cell.refused for cell in cells if cell.refused))
        if self.cluster is None and cells and all(cell.refused for cell in cells):
            screen.warn(f"{name} cannot run on this machine: {refused[0]}")
            return StepOutcome(name, step.command, "refused", 0.0, refused[0])
        try:
            self._do(step, screen)
        except EvalError as error:
            screen.error.print(f"{name} failed: {error}", markup=False)
            return StepOutcome(name, step.command, "failed", time.monotonic() - start, error.what)
        return StepOutcome(name, step.command, "ok", time.monotonic() - start)

    def _do(self, step: Step, screen: Screen) -> None:
        if isinstance(step, QuantizeStep):
            self._quantize(step, screen)
        elif isinstance(step, PerplexityStep):
            self._perplexity(step, screen)
        elif isinstance(step, SpeedStep):
            names = [self._models.name(role) for role in self.evaluation.roles(step)]
            place, gpu_count = self._place(screen)
            sweep = step.sweep(names, gpu_count)
            measure_speed(screen, place, sweep, self.results, dry_run=False, mode="auto", no_model=False)
        elif isinstance(step, FootprintStep):
            for role in self.evaluation.roles(step):
                watch_model(screen, step.spec(self._models.name(role)), self.results, again=False)
        elif isinstance(step, CacheStep):
            self._cache(step, screen)
        elif isinstance(step, CheckStep):
            self._check(step, screen)
        elif isinstance(step, CardStep):
            self._card(step, screen)
        else:
            claims = Path(step.claims) if step.claims else None
            make_report(screen, [self.results], step.formats, claims=claims)

    def _place(self, screen: Screen) -> tuple[Place, int]:
        """Where cells run, and how many GPUs there are."""
        if self.cluster is None:
            machine = read_machine()
            return Place(machine, None), count_visible(len(machine.gpus))
        from evalsuite.cluster.benches import survey

        machine, gpu_count = survey(self.cluster, LiveSweep(screen))
        return Place(machine, self.cluster), gpu_count

    def _quantize(self, step: QuantizeStep, screen: Screen) -> None:
        folder = self._models.folder
        if folder.is_dir():
            screen.note(f"{folder} was made before")
            return
        spec = QuantizeSpec(
            source=self._models.name("baseline"), recipe=step.recipe.as_dict(), device=step.device
        )
        quantize_model(screen, spec, folder, self.results)

    def _perplexity(self, step: PerplexityStep, screen: Screen) -> None:
        first, *others = [self._models.name(role) for role in self.evaluation.roles(step)]
        spec, baseline = step.spec(first, *others), others[0] if others else None
        try:
            self._score(spec, baseline, screen)
        except EvalError:
            if baseline is not None and not self._is_scored(spec.model_copy(update={"model": baseline})):
                screen.warn(f"{baseline} came to nothing; {first} is scored all the same")
                self._score(spec, None, screen)
            raise

    def _score(self, spec: PerplexitySpec, baseline: str | None, screen: Screen) -> None:
        measure_perplexity(
            screen, spec, self.results, baseline=baseline, inherit=[], mode="auto", again=False,
            cluster=self.cluster,
        )  # fmt: skip

    def _is_scored(self, spec: PerplexitySpec) -> bool:
        try:
            checkpoint = find_checkpoint(spec.model, download=False)
        except ModelError:
            return False
        return any(True for _ in finished_scores(RunStore(self.results), spec, checkpoint))

    def _cache(self, step: CacheStep, screen: Screen) -> None:
        request = step.request(self._models.name("candidate"))
        checkpoint = find_checkpoint(request.model, weights=request.load_format != "dummy")
        folder = trace_folder(self.work, request, checkpoint)
        if (folder / TRACE_FILE).exists():
            screen.note(f"{folder} was traced before")
        else:
            make_trace(screen, request, folder, replace=False)
        out = self.results / checkpoint.slug / slug_of(name_of(step))
        run_simulation(screen, folder, step, model=None, results=out)

    def _check(self, step: CheckStep, screen: Screen) -> None:
        verdicts = check_claims(screen, Path(step.claims), self.results)
        if found := sorted({verdict for verdict in verdicts if verdict in step.fail_on}):
            raise MeasurementError(f"There are claims of the verdict {', '.join(found)}.")

    def _card(self, step: CardStep, screen: Screen) -> None:
        checkpoint = find_checkpoint(self._models.name("candidate"), weights=False, download=False)
        request = CardRequest((self.results,), checkpoint.name, step.license, step.base_model)
        write_card(screen, request, self.results / checkpoint.slug / "MODEL_CARD.md")


def _refuse_full_disks(models: Sequence[PlannedModel]) -> None:
    for model in models:
        if model.fits_disk is False:
            assert model.weights_bytes is not None
            others = f" beside {si_bytes(model.before_bytes)} of another model" if model.before_bytes else ""
            raise UsageError(
                f"{model.name} needs {si_bytes(model.weights_bytes)}{others}, and its disk has "
                f"{si_bytes(model.free_bytes)} free.",
                todo="make room, or choose a disk: HF_HOME for downloads, --work for what is quantized.",
            )
