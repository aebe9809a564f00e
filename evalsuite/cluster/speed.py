"""A sweep on a cluster: each group of cells that share a loaded model is a task with GPUs of its own.

A cell runs on its node exactly as on any machine, by `evalsuite.run.speed`, and its record is the node's.
Timings disturb one another through the processor and the bus, so a sweep can take whole nodes, and without
GPUs always does.
"""

import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evalsuite.cluster.benches import admitted, connected_benches
from evalsuite.cluster.cells import CellFiles, Ended, Said, Source, measure_group
from evalsuite.cluster.connect import ClusterChoice
from evalsuite.cluster.nodes import only_on, read_node
from evalsuite.cluster.places import Benches, Errand, Place, Places
from evalsuite.core.errors import EngineDied, EvalError, ResumeMismatch, first_line
from evalsuite.core.record import Record
from evalsuite.core.spec import SpeedSpec, spec_hash
from evalsuite.core.sweep import groups
from evalsuite.data.corpora import Corpus
from evalsuite.data.models import local_name
from evalsuite.run.perplexity import Finished
from evalsuite.run.resume import finished_cell
from evalsuite.run.speed import Plan, outcome
from evalsuite.store.folder import storage_errors
from evalsuite.store.runs import RunStore

LOOK_S = 2.0
MOST_LOSSES = 3  # nodes that one group of cells may cost


@dataclass
class _Running:
    """An errand under way.

    Attributes:
        beside: the most GPUs of its node that other errands had at once since its latest cell began.
    """

    errand: Errand
    place: Place
    answers: Any
    beside: int = 0


def run_sweep_on(
    choice: ClusterChoice, plan: Plan, chosen: Sequence[SpeedSpec], corpus: Corpus
) -> list[list[Finished]]:
    """As `evalsuite.run.speed.run_sweep`, on every kind of node that the choice names.

    Returns:
        For each kind, one for each cell, in the order given; what was measured before on such a machine is
        found again.

    Raises:
        EngineDied: a group of cells has cost several tasks or nodes.
        EvalError: what ended a group of cells on the last node of a kind.
    """
    with connected_benches(choice, plan.progress) as (ray, benches):
        return _Sweep(ray, benches, choice.exclusive, plan, chosen, corpus).run()


class _Sweep:
    """A sweep while it runs."""

    def __init__(
        self,
        ray: Any,
        benches: Benches,
        exclusive: bool,
        plan: Plan,
        chosen: Sequence[SpeedSpec],
        corpus: Corpus,
    ) -> None:
        self._ray, self._benches = ray, benches
        self._plan, self._chosen = plan, chosen
        self._corpus = ray.put(corpus)
        self._finished: dict[tuple[str | None, str], Finished] = {}
        self._waiting: deque[Errand] = deque()
        self._running: list[_Running] = []
        self._places = Places(benches, exclusive)
        self._seen = {found["NodeID"] for found in ray.nodes()}
        self._looked_s = time.monotonic()

    def run(self) -> list[list[Finished]]:
        """See `run_sweep_on`."""
        plan, kinds = self._plan, list(self._benches)
        for kind in kinds:
            self._find(kind)
        total = len(kinds) * len(self._chosen)
        if self._finished:
            plan.progress.phase(f"{len(self._finished)} of {total} cells were measured before")
        elif plan.mode == "resume":
            raise ResumeMismatch(
                "No cell of this sweep has been measured under these conditions.",
                todo="leave out --resume to start it.",
            )
        for kind in kinds:
            left = [cell for cell in self._chosen if (kind, spec_hash(cell)) not in self._finished]
            self._waiting += [Errand(kind, group) for group in groups(left, plan.seed)]
        try:
            while self._waiting or self._running:
                self._look()
                self._start()
                self._listen(total)
        finally:
            for running in self._running:
                self._ray.cancel(running.answers, force=True)
        return [[self._finished[kind, spec_hash(cell)] for cell in self._chosen] for kind in kinds]

    def _look(self) -> None:
        """Let nodes in that came since the sweep began, while cells still wait."""
        if not self._waiting or time.monotonic() - self._looked_s < LOOK_S:
            return
        self._looked_s = time.monotonic()
        new = [n for n in self._ray.nodes() if n["Alive"] and n["NodeID"] not in self._seen]
        nodes = [read_node(len(self._seen) + place, found) for place, found in enumerate(new, 1)]
        self._seen |= {node.id for node in nodes}
        for kind, benches in self._benches.items():
            like = benches[0].node
            fitting = [
                node
                for node in nodes
                if node.is_of(kind)
                and node.accelerator == like.accelerator
                and bool(node.gpus) == bool(like.gpus)
            ]
            benches += admitted(
                self._ray,
                [node for node in fitting if node.cpus >= 1],
                self._plan.progress,
                benches[0].machine,
            )

    def _find(self, kind: str | None) -> None:
        """Cells that were measured before on a node like those of this kind."""
        plan = self._plan
        if plan.mode == "fresh":
            return
        machines = {bench.machine.model_dump_json(): bench.machine for bench in self._benches[kind]}
        for cell in self._chosen:
            for machine in machines.values():
                if found := finished_cell(plan.store, cell, plan.subjects[cell.model], machine):
                    self._finished[kind, spec_hash(cell)] = found
                    break

    def _start(self) -> None:
        """Give every errand that finds room a node."""
        for _ in range(len(self._waiting)):
            errand = self._waiting.popleft()
            place = self._places.take(errand)
            if place is None:
                self._waiting.append(errand)
                continue
            task = self._ray.remote(measure_group).options(
                num_cpus=place.cpus, num_gpus=place.gpus, num_returns="streaming", max_retries=0,
                scheduling_strategy=only_on(place.bench.node),
            )  # fmt: skip
            model, tokenizer = errand.cells[0].model, errand.cells[0].workload.tokenizer
            source = Source(
                local_name(model), tokenizer and local_name(tokenizer),
                self._plan.subjects[model].fingerprint,
            )  # fmt: skip
            threads = os.environ.get("OMP_NUM_THREADS")
            answers = task.remote(errand.cells, self._corpus, source, self._plan.seed, threads)
            self._running.append(_Running(errand, place, answers))
            for running in self._running:
                running.beside = max(running.beside, self._gpus_beside(running))

    def _gpus_beside(self, running: _Running) -> int:
        """GPUs of the same node that other errands have now."""
        node = running.place.bench.node.id
        others = [one for one in self._running if one is not running and one.place.bench.node.id == node]
        return sum(other.place.gpus for other in others)

    def _listen(self, total: int) -> None:
        """Take what the running errands have sent."""
        refs = [running.answers for running in self._running]
        ready, _ = self._ray.wait(refs, num_returns=1, timeout=LOOK_S, fetch_local=False)
        for running in [running for running in self._running if running.answers in ready]:
            try:
                news = self._ray.get(next(running.answers))
            except StopIteration:
                self._end(running)
            except self._ray.exceptions.RayError as error:
                self._lose(running, first_line(error))
            else:
                self._hear(running, news, total)

    def _hear(self, running: _Running, news: Said | CellFiles | Ended, total: int) -> None:
        match news:
            case Said(text):
                self._plan.progress.phase(f"node {running.place.bench.node.number}: {text}")
            case CellFiles(files):
                found = _keep(self._plan.store, files, running.beside)
                running.beside = self._gpus_beside(running)
                cell = SpeedSpec.model_validate(found.record.spec)
                self._finished[running.errand.kind, spec_hash(cell)] = found
                running.errand.cells.remove(cell)
                self._plan.progress.cell(len(self._finished), total, outcome(found.record))
            case Ended(EvalError() as error):
                self._refuse(running, error)
            case Ended():
                self._end(running)

    def _end(self, running: _Running) -> None:
        self._running.remove(running)
        self._places.give_back(running.place)

    def _refuse(self, running: _Running, error: EvalError) -> None:
        """A node cannot measure; others of its kind go on with what it had not sent.

        Raises:
            EvalError: there is none.
        """
        self._end(running)
        node, errand = running.place.bench.node, running.errand
        self._places.gone.add(node.id)
        self._plan.progress.phase(f"{node.name} is refused: {error.what}")
        if not errand.cells:
            return
        if not self._places.left_for(errand):
            raise type(error)(f"{node.name}: {error.what}", cause=error.cause, todo=error.todo)
        self._waiting.append(errand)

    def _lose(self, running: _Running, reason: str) -> None:
        """A task or its node is gone; what it had not sent is measured elsewhere, or there once more."""
        self._end(running)
        node, errand = running.place.bench.node, running.errand
        if not errand.cells:
            return
        self._plan.progress.phase(f"{node.name} lost its cells: {reason}")
        errand.losses += 1
        if errand.losses >= MOST_LOSSES:
            raise EngineDied(
                f"The cells of {errand.cells[0].model} ended {MOST_LOSSES} tasks one after the other.",
                cause=reason,
                todo="measure them on one machine, without --cluster, to see why.",
            )
        time.sleep(1.0)  # Ray learns of a dead node a moment later
        alive = {found["NodeID"] for found in self._ray.nodes() if found["Alive"]}
        self._places.gone |= {
            bench.node.id for benches in self._benches.values() for bench in benches
        } - alive
        self._waiting.append(errand)


def _side_by_side(gpus: int) -> tuple[str, ...]:
    """What a reader of a cell must know about the GPUs beside its own."""
    if not gpus:
        return ()
    which = "another GPU of its node was" if gpus == 1 else f"{gpus} other GPUs of its node were"
    return (f"{which} measured at the same time",)


def _keep(store: RunStore, files: dict[str, bytes], beside: int) -> Finished:
    """A node's record and files, in the driver's results folder under an id of its own."""
    record = Record.model_validate_json(files["run.json"])
    slug = record.run_id.partition("/")[0]
    folder = store.begin(record.kind, slug, record.spec_hash, {"spec": record.spec}, "fresh")
    with storage_errors(folder.path):
        for name, content in files.items():
            if name != "run.json":
                (folder.path / name).write_bytes(content)
    record = record.model_copy(
        update={
            "run_id": folder.run_id,
            "warnings": (*record.warnings, *_side_by_side(beside)),
            "beside": beside,
        }
    )
    return Finished(folder.finish(record), record)
