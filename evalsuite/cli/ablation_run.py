"""What `run` does with an ablation: its plan, or its tables and what failed."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from evalsuite.cli.show import Screen
from evalsuite.core.errors import EvalError, MeasurementError
from evalsuite.core.record import Record
from evalsuite.experiment.ablation_run import Part, Run
from evalsuite.report.experiment import (
    ArmResult,
    engines_table,
    experiment_table,
    failures_table,
    plan_table,
)
from evalsuite.report.tables import Table
from evalsuite.store.derived import write_derived


def show_plan(screen: Screen, job: Run) -> None:
    """What every arm will take; nothing is loaded or written."""
    chosen = job.experiment
    arms, windows = job.plan()
    screen.table(plan_table(chosen.question, arms, windows, chosen.engine))
    counts = {windows.name: count for windows, count in windows}
    screen.document({"windows": counts, "arms": [arm.as_dict() for arm in arms]})


def run_ablation(screen: Screen, job: Run, name: str | None) -> None:
    """Do what is missing, show every table, and keep them in the results folder.

    Args:
        name: of the file that keeps them; None keeps none, as some windows do not stand for all.

    Raises:
        MeasurementError: an arm failed; all others are done.
    """
    tables: list[Table[Any]] = []
    document: dict[str, list[Any]] = {"arms": [], "engines": []}
    unpaired: list[tuple[str, str]] = []
    with ExitStack() as stack:
        watcher = Steps(screen, stack)
        parts = job.run(watcher)
        for protocol in job.experiment.protocols:
            here = [part for part in parts if part.setting.protocol == protocol]
            rows, scored = _by_arm(here), _records(here)
            document["arms"] += [{"protocol": protocol.name, **row.as_dict()} for row in rows]
            if not scored:
                continue
            several = len(job.experiment.protocols) > 1
            title = job.experiment.question + several * f" ({protocol.name})"
            tables.append(experiment_table(title, rows, scored))
            if len(here) == 2:
                pairs = job.compare_engines(here, watcher)
                unpaired += [
                    (f"{pair.name} ({protocol.name}: engine against engine)", pair.failed)
                    for pair in pairs
                    if pair.failed and pair.first is not None and pair.second is not None
                ]
                tables.append(engines_table(title, job.experiment.engine, pairs, scored))
                of = {"protocol": protocol.name} | dict(
                    zip(("baseline_engine", "candidate_engine"), job.experiment.engine, strict=True)
                )
                document["engines"] += [of | pair.as_dict() for pair in pairs]
    failed = [
        (f"{row.name} ({part.setting})", row.failed) for part in parts for row in part.rows if row.failed
    ]
    failed += unpaired
    if failed:
        tables.append(failures_table(failed))
    for table in tables:
        screen.table(table)
    if name is not None:
        text = "\n".join(f"# {table.title}\n\n{table.to_markdown()}\n" for table in tables)
        screen.note(f"table: {write_derived(job.store.root / f'{name}.md', text)}")
    screen.document(document)
    if failed:
        raise MeasurementError(
            f"These have no result: {', '.join(what for what, _ in failed)}.",
            todo="read why above; the same command does what is missing.",
        )


def _by_arm(parts: Sequence[Part]) -> list[ArmResult]:
    """Each arm's rows together, one an engine."""
    return [row for rows in zip(*(part.rows for part in parts), strict=True) for row in rows]


def _records(parts: Sequence[Part]) -> list[Record]:
    return [run.record for part in parts for run in part.scored.values()]


class Steps:
    """A display for each step in turn; the last one's is put away when the next begins."""

    def __init__(self, screen: Screen, stack: ExitStack) -> None:
        self._screen, self._stack = screen, stack

    def scoring(self, step: str) -> Any:
        self._next(step)
        return self._stack.enter_context(self._screen.progress())

    def quantizing(self, step: str) -> Any:
        self._next(step)
        return self._stack.enter_context(self._screen.quantizing())

    def failed(self, step: str, error: EvalError) -> None:
        self._stack.pop_all().close()
        self._screen.error.print(f"{step} failed: {error}", markup=False)

    def _next(self, step: str) -> None:
        self._stack.pop_all().close()
        self._screen.note(step)
