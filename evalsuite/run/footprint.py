"""A model watched from outside through load, idle, prefill and decode."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from evalsuite.core.cache import CacheCounters
from evalsuite.core.errors import EvalError, UsageError
from evalsuite.core.record import Record, status_of
from evalsuite.core.spec import FootprintSpec, Serving, spec_hash
from evalsuite.core.speed import FootprintResult, LoadTimes
from evalsuite.core.telemetry import EngineMemory, Telemetry
from evalsuite.engines.process import ProcessGenerator
from evalsuite.engines.select import choose_engine
from evalsuite.experts.files import cache_folder
from evalsuite.measure.footprint import live
from evalsuite.run.cell import require_expert_cache
from evalsuite.run.forecast import refuse_missing_gpus
from evalsuite.run.perplexity import DEMO_WARNING
from evalsuite.run.record import new_record
from evalsuite.run.subject import Subject
from evalsuite.store.folder import RunFolder
from evalsuite.store.runs import RunStore
from evalsuite.telemetry.disk import hub_cache_bytes
from evalsuite.telemetry.gpu import visible_gpus
from evalsuite.telemetry.machine import read_machine
from evalsuite.telemetry.pagecache import Places, disk_bytes, resident_share
from evalsuite.telemetry.process import ProcessTree, files_held
from evalsuite.telemetry.samples import PARQUET
from evalsuite.telemetry.watch import Watch

LOG = "engine.log"
CHECKPOINT, EXPERTS, HUB = "checkpoint", "expert_files", "hub_cache"
Opener = Callable[[str, Serving, Path, float], ProcessGenerator]


@dataclass(frozen=True)
class Footprint:
    """A run in the store, and the error that ended its engine, if one did."""

    path: Path
    record: Record
    error: EvalError | None


def run_footprint(
    spec: FootprintSpec,
    subject: Subject,
    store: RunStore,
    phase: Callable[[str], None],
    opener: Opener = ProcessGenerator,
) -> Footprint:
    """Watch one model. An engine that fails is a result: what it took until then is in the record.

    Args:
        phase: told when a phase begins.

    Raises:
        UsageError: the engine does not run in a process that could be watched, or cannot honour the request.
    """
    if spec.serving.server_url is not None:
        raise UsageError(
            f"The memory of {spec.serving.server_url} cannot be watched.",
            cause="it was not started here, so its processes are unknown.",
            todo="leave --server-url out, so that the engine is started here.",
        )
    refuse_missing_gpus(spec.serving, read_machine())
    choose_engine(spec.serving, subject.checkpoint)
    folder = store.begin(
        spec.kind, subject.checkpoint.slug, spec_hash(spec), {"spec": spec.model_dump(mode="json")}, "fresh"
    )
    run = _Run(spec, subject, folder, phase)
    try:
        error = run.measure(opener)
        if error is not None:  # the folder is about to change its name
            error.todo = error.todo.replace(f"{folder.path}/", "")
        record = run.record(error)
        return Footprint(folder.finish(record), record, error)
    except BaseException as error:
        folder.leave_unfinished(run.record(error), error)
        raise


class _Run:
    """A run while it is measured. What it has found so far is there, however it ends."""

    def __init__(
        self, spec: FootprintSpec, subject: Subject, folder: RunFolder, phase: Callable[[str], None]
    ) -> None:
        self._spec, self._subject, self._folder, self._phase = spec, subject, folder, phase
        dummy = spec.serving.load_format == "dummy"
        self._weights = [] if dummy else subject.checkpoint.weight_files()
        self._telemetry: Telemetry | None = None
        self._result: FootprintResult | None = None
        self._engine: ProcessGenerator | None = None
        self._counters: CacheCounters | None = None
        self._pid: int | None = None
        self._tree = ProcessTree(self._root)

    def measure(self, opener: Opener) -> EvalError | None:
        """Returns the error that ended the engine, if one did."""
        serving, workload = self._spec.serving, self._spec.workload
        gpus = visible_gpus(serving.gpus, serving.tensor_parallel_size)
        files: dict[str, Places] = {CHECKPOINT: self._weights} if self._weights else {}
        if serving.moe_expert_store == "disk" and serving.moe_expert_cache_size is not None:
            files[EXPERTS] = self._expert_files
        (prompts,) = self._subject.prompts(workload)
        warm = resident_share(self._weights)
        watch = Watch(self._folder.path, self._root, gpus, files)
        memory: EngineMemory | None = None
        try:
            with watch:
                engine = opener(self._spec.model, serving, self._folder.path / LOG, workload.timeout_s)
                self._pid = engine.pid
                try:
                    self._begin(watch, "load")
                    engine.start()
                    self._engine = engine
                    engine.deadline_s = time.monotonic() + self._spec.idle_s + workload.timeout_s
                    live(
                        engine, prompts, workload.output_len, self._spec.idle_s,
                        lambda name: self._begin(watch, name),
                    )  # fmt: skip
                    watch.end_phase()
                    memory = engine.memory()
                    self._counters = engine.expert_cache()
                    require_expert_cache(serving, engine.facts, self._counters)
                    self._result = self._summarise(engine.load, warm)
                finally:
                    engine.close()
        except EvalError as error:
            return error
        finally:
            self._telemetry = watch.summary().model_copy(update={"engine": memory})
        return None

    def _begin(self, watch: Watch, name: str) -> None:
        watch.phase(name)
        self._phase(name)

    def _root(self) -> int | None:
        return self._pid

    def _expert_files(self) -> list[Path]:
        return files_held(self._tree, cache_folder())

    def _summarise(self, load: LoadTimes, warm: float | None) -> FootprintResult:
        disk, absent = {CHECKPOINT: disk_bytes(self._weights)}, dict[str, str]()
        if not self._weights:
            absent[CHECKPOINT] = "dummy weights come from no file"
            del disk[CHECKPOINT]
        if (hub := hub_cache_bytes()) is None:
            absent[HUB] = "this machine has no hub cache"
        else:
            disk[HUB] = hub
        if files := self._expert_files():
            disk[EXPERTS] = disk_bytes(files)
        else:
            absent[EXPERTS] = "the engine has none open"
        if load.resident_share is None:
            load = load.model_copy(update={"resident_share": warm})
        return FootprintResult(
            checkpoint_bytes=sum(path.stat().st_size for path in self._weights),
            disk_bytes=disk,
            disk_absent=absent,
            load=load,
            input_len=self._spec.workload.input_len,
            output_len=self._spec.workload.output_len,
        )

    def record(self, error: BaseException | None) -> Record:
        """As far as the run came."""
        facts = self._engine.facts if self._engine else None
        demo = (DEMO_WARNING,) if self._spec.model == "demo" else ()
        beside = self._telemetry.warnings() if self._telemetry else ()
        status = "ok" if error is None else status_of(error)
        return new_record(self._folder, self._spec, status).model_copy(
            update={
                "model": facts,
                "text": self._subject.text,
                "results": self._result,
                "expert_cache": self._counters,
                "telemetry": self._telemetry,
                "engaged": facts.engaged if facts else {},
                "warnings": (*demo, *self._subject.warnings, *(facts.warnings if facts else ()), *beside),
                "error": str(error) if isinstance(error, EvalError) else None,
                "files": tuple(name for name in (PARQUET, LOG) if (self._folder.path / name).is_file()),
            }
        )
