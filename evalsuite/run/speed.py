"""A sweep: every cell a record, whatever becomes of it.

Cells that share a loaded model run in one child process, which is replaced when it fails or cannot change its
cache size. A cell that is finished is found again by the next run of the same command; one that failed is
tried again. Out of memory, a crash and a timeout are results, and the sweep goes on.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from evalsuite.core.bandwidth import Bandwidth
from evalsuite.core.errors import EvalError, ResumeMismatch, StorageError
from evalsuite.core.record import Record, status_of
from evalsuite.core.spec import Serving, SpeedSpec, spec_hash
from evalsuite.core.sweep import groups, label
from evalsuite.engines.bandwidth import measure_bandwidth
from evalsuite.engines.process import ProcessGenerator
from evalsuite.engines.select import choose_engine
from evalsuite.run.cell import Cell, engaged
from evalsuite.run.forecast import DEVICE_UNKNOWN
from evalsuite.run.held import HeldEngine, Opener
from evalsuite.run.idle import IdleMemory
from evalsuite.run.lanes import Claim, Lanes
from evalsuite.run.perplexity import DEMO_WARNING, Finished
from evalsuite.run.record import new_record
from evalsuite.run.resume import finished_cell
from evalsuite.run.subject import Subject
from evalsuite.store.folder import RunFolder, storage_errors
from evalsuite.store.runs import TOKENS, ResumeMode, RunStore, utc_now
from evalsuite.telemetry.gpu import visible_gpus
from evalsuite.telemetry.machine import read_machine
from evalsuite.telemetry.samples import LINES, PARQUET
from evalsuite.telemetry.watch import Watch

LOG = "engine.log"


class SweepProgress(Protocol):
    """Whoever watches a sweep; called from several threads."""

    def phase(self, text: str) -> None:
        """A new stage begins."""
        ...

    def cell(self, done: int, total: int, text: str) -> None:
        """So many cells are over, the last one with this outcome."""
        ...


@dataclass(frozen=True)
class Plan:
    """What a sweep needs besides its cells.

    Attributes:
        subjects: of every model among the cells.
        seed: decides the order of the cells.
        mode: ``fresh`` measures also what is finished; ``resume`` insists that something is.
        opener: makes an engine's process.
    """

    store: RunStore
    subjects: dict[str, Subject]
    seed: int
    mode: ResumeMode
    progress: SweepProgress
    opener: Opener = ProcessGenerator


def run_sweep(plan: Plan, chosen: Sequence[SpeedSpec]) -> list[Finished]:
    """Measure all cells that are not finished.

    Returns:
        One for each cell, in the order given; a record's status tells what became of it.

    Raises:
        KeyboardInterrupt, StorageError: what was finished before is kept.
    """
    return Sweep(plan, chosen).run()


class Sweep:
    """A sweep while it runs."""

    def __init__(self, plan: Plan, chosen: Sequence[SpeedSpec]) -> None:
        self._plan, self._chosen = plan, chosen
        self._machine = read_machine()
        self._finished: dict[str, Finished] = {}
        self._bandwidths: dict[int | None, Bandwidth | EvalError] = {}
        self._engines: list[ProcessGenerator] = []
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._idle = IdleMemory(gpu for cell in chosen for gpu in _watched(cell.serving))

    def run(self) -> list[Finished]:
        """See `run_sweep`."""
        plan, total = self._plan, len(self._chosen)
        for cell in () if plan.mode == "fresh" else self._chosen:
            if found := finished_cell(plan.store, cell, plan.subjects[cell.model], self._machine):
                self._finished[spec_hash(cell)] = found
        if self._finished:
            plan.progress.phase(f"{len(self._finished)} of {total} cells were measured before")
        elif plan.mode == "resume":
            raise ResumeMismatch(
                "No cell of this sweep has been measured under these conditions.",
                todo="leave out --resume to start it.",
            )
        left = [cell for cell in self._chosen if spec_hash(cell) not in self._finished]
        claims = [Claim(group[0].serving.gpus, group) for group in groups(left, plan.seed)]
        Lanes(self._run_group, self._stop, self._kill).run(claims)
        return [self._finished[spec_hash(cell)] for cell in self._chosen]

    def _run_group(self, group: list[SpeedSpec], beside: Callable[[], tuple[int, ...]]) -> None:
        gpus = group[0].serving.gpus
        attached = group[0].serving.server_url is not None
        bandwidth = EvalError(DEVICE_UNKNOWN) if attached else self._bandwidth(gpus[0] if gpus else None)
        with TemporaryDirectory(prefix="hlwq-eval-") as scratch:
            held = HeldEngine(
                self._open, Path(scratch) / LOG, lambda: self._idle.wait(_watched(group[0].serving))
            )
            try:
                for cell in group:
                    if self._stop.is_set():
                        return
                    self._run_cell(cell, held, bandwidth, beside)
            finally:
                held.drop()

    def _run_cell(
        self,
        cell: SpeedSpec,
        held: HeldEngine,
        bandwidth: Bandwidth | EvalError,
        beside: Callable[[], tuple[int, ...]],
    ) -> None:
        plan, subject = self._plan, self._plan.subjects[cell.model]
        plan.progress.phase(label(cell))
        folder = plan.store.begin(
            cell.kind, subject.checkpoint.slug, spec_hash(cell), {"spec": cell.model_dump(mode="json")},
            "fresh" if plan.mode == "fresh" else "auto",
        )  # fmt: skip
        for scrap in (TOKENS, PARQUET, LINES, LOG, "run.json"):  # of an attempt that broke off
            (folder.path / scrap).unlink(missing_ok=True)
        log_start = held.log.stat().st_size if held.log.exists() else 0
        measuring = Cell(cell, subject, folder.path)
        record = self._blank(folder, cell, subject)
        try:
            held.adapt(cell)
            watch = Watch(
                folder.path,
                lambda: held.pid if cell.serving.server_url is None else None,  # its process is a client's
                _watched(cell.serving),
                {"checkpoint": subject.checkpoint.weight_files()},
                no_process="a server that runs already is not watched" if cell.serving.server_url else None,
            )
            try:
                with watch:
                    record = self._measure(cell, held, measuring, record, bandwidth, watch.phase)
            except StorageError:
                raise
            except EvalError as error:
                held.drop()
                if self._stop.is_set():
                    raise KeyboardInterrupt from error
                record = record.model_copy(update={"status": status_of(error), "error": str(error)})
            telemetry = watch.summary().model_copy(update={"engine": measuring.memory})
            others = beside()
            record = record.model_copy(
                update={
                    "finished": utc_now(),
                    "warnings": (
                        *record.warnings, *_side_by_side(others), *held.warnings, *telemetry.warnings(),
                    ),
                    "beside": len(others),
                    "telemetry": telemetry,
                    "files": self._keep_files(folder, held.log, log_start),
                }
            )  # fmt: skip
            finished = Finished(folder.finish(record), record)
        except BaseException as error:
            self._keep_files(folder, held.log, log_start)
            folder.leave_unfinished(record.model_copy(update={"status": status_of(error)}), error)
            if isinstance(error, KeyboardInterrupt) and self._stop.is_set():
                return  # the main thread has the Ctrl-C
            raise
        with self._lock:
            self._finished[spec_hash(cell)] = finished
            plan.progress.cell(len(self._finished), len(self._chosen), outcome(record))

    def _measure(
        self,
        cell: SpeedSpec,
        held: HeldEngine,
        measuring: Cell,
        record: Record,
        bandwidth: Bandwidth | EvalError,
        phase: Callable[[str], None],
    ) -> Record:
        checkpoint = self._plan.subjects[cell.model].checkpoint
        engine = held.acquire(cell)
        phase("load")
        held.start(checkpoint.weight_files())
        engine.deadline_s = time.monotonic() + cell.workload.timeout_s
        measuring.measure(engine, phase)
        assert held.load is not None
        name, why = choose_engine(cell.serving, checkpoint)
        proofs = engaged(engine.facts, measuring, held.loaded_with)
        return record.model_copy(
            update={
                "status": "ok",
                "model": engine.facts,
                "results": measuring.summarise(engine.facts, held.load, bandwidth),
                "expert_cache": measuring.counters,
                "engaged": proofs | {"engine": name, "because": why},
                "warnings": (*record.warnings, *engine.facts.warnings),
            }
        )

    def _blank(self, folder: RunFolder, cell: SpeedSpec, subject: Subject) -> Record:
        demo = (DEMO_WARNING,) if cell.model == "demo" else ()
        return new_record(folder, cell, "running", self._machine).model_copy(
            update={
                "started": utc_now(),  # of this attempt: an earlier one may have broken off in this folder
                "text": subject.text,
                "warnings": (*demo, *subject.warnings),
            }
        )

    def _keep_files(self, folder: RunFolder, log: Path, start: int) -> tuple[str, ...]:
        """Copy what the engine wrote during this cell; the names of all files beside the record."""
        if log.exists():
            with storage_errors(folder.path), log.open("rb") as source:
                source.seek(start)
                (folder.path / LOG).write_bytes(source.read())
        return tuple(name for name in (TOKENS, PARQUET, LOG) if (folder.path / name).is_file())

    def _bandwidth(self, gpu: int | None) -> Bandwidth | EvalError:
        """Measured once a device, before an engine is on it; no other lane has this one."""
        if gpu not in self._bandwidths:
            self._plan.progress.phase(
                f"measuring the bandwidth of {'the CPU' if gpu is None else f'GPU {gpu}'}"
            )
            try:
                self._bandwidths[gpu] = measure_bandwidth(gpu)
            except EvalError as error:
                self._bandwidths[gpu] = error
        return self._bandwidths[gpu]

    def _open(self, model: str, serving: Serving, log: Path, load_timeout_s: float) -> ProcessGenerator:
        with self._lock:
            if self._stop.is_set():
                raise KeyboardInterrupt
            engine = self._plan.opener(model, serving, log, load_timeout_s)
            self._engines.append(engine)
        return engine

    def _kill(self) -> None:
        with self._lock:
            for engine in self._engines:
                engine.kill()


def _watched(serving: Serving) -> tuple[int, ...]:
    """The cell's GPUs as the driver counts them."""
    return visible_gpus(serving.gpus, 0)


def _side_by_side(gpus: Sequence[int]) -> tuple[str, ...]:
    """What a reader of a cell must know about the GPUs beside its own."""
    if not gpus:
        return ()
    names, verb = ", ".join(f"GPU {gpu}" for gpu in gpus), "was" if len(gpus) == 1 else "were"
    return (f"{names} {verb} measured at the same time",)


def outcome(record: Record) -> str:
    """A finished cell in one line."""
    what = label(SpeedSpec.model_validate(record.spec))
    if record.results is None or record.results.kind != "speed":
        return f"{what}: {record.status}: {(record.error or '').partition(chr(10))[0]}"
    return f"{what}: {record.results.decode_tokens_per_s.mean:.3g} tokens/s"
