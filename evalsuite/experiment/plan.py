"""What an evaluation will take, before anything of it runs.

Least times, from measured rates of this machine:

    perplexity   2 · numbers that a token is multiplied with · windows · context / matrix rate
    speed        rounds · output tokens / bound on decoding
    footprint    rest after loading + output tokens / bound on decoding
    quantize     bytes of the source / rate of the newest quantization in the store on such a machine
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from evalsuite.core.bandwidth import Bandwidth
from evalsuite.core.errors import EvalError, UsageError
from evalsuite.core.geometry import Geometry
from evalsuite.core.record import Machine, QuantizeResult
from evalsuite.core.spec import FootprintSpec, PerplexitySpec, Serving, SpeedSpec
from evalsuite.core.sweep import cells, label, reference_cells
from evalsuite.data.corpora import Corpus, load_corpus
from evalsuite.data.models import Checkpoint
from evalsuite.engines.geometry import read_geometry
from evalsuite.engines.predict import predict_geometry
from evalsuite.engines.scorers import check_scorer, choose_scorer, serving_of
from evalsuite.engines.tokenizer import load_tokenizer
from evalsuite.experiment.evaluation import (
    CacheStep,
    Evaluation,
    FootprintStep,
    PerplexityStep,
    QuantizeStep,
    Role,
    SpeedStep,
    Step,
    name_of,
)
from evalsuite.experiment.models import Subject
from evalsuite.experiment.traces import trace_folder
from evalsuite.report.evaluation import PlannedCell
from evalsuite.run.forecast import available_modes, fits, forecast, refuse_cell
from evalsuite.run.perplexity import Text, prepare_text
from evalsuite.run.resume import finished_cell, finished_scores
from evalsuite.run.subject import check_cache_sizes, config_value, prepare
from evalsuite.run.trace import TRACE_FILE, expert_geometry
from evalsuite.store.runs import RunStore, load_record
from evalsuite.telemetry.gpu import count_visible

NOT_HERE = "no configuration of {} is here"


@dataclass
class Planner:
    """Looks at every step of an evaluation.

    Attributes:
        subjects: what is known of the models.
        work: the folder that traces are kept in.
        bandwidth_of: of a GPU, or the CPU for None; None leaves times out.
    """

    evaluation: Evaluation
    subjects: Mapping[Role, Subject]
    store: RunStore
    work: Path
    machine: Machine
    bandwidth_of: Callable[[int | None], Bandwidth] | None
    _rates: dict[int | None, Bandwidth | EvalError] = field(default_factory=dict)
    _corpora: dict[str, Corpus | EvalError] = field(default_factory=dict)

    def cells(self, step: Step) -> list[PlannedCell]:
        """Every measurement of a step; none for steps that measure nothing."""
        if isinstance(step, QuantizeStep):
            return [self._quantization(step)]
        if isinstance(step, PerplexityStep):
            return list(self._perplexity(step))
        if isinstance(step, SpeedStep):
            return list(self._speed(step))
        if isinstance(step, FootprintStep):
            return list(self._footprint(step))
        return [self._trace(step)] if isinstance(step, CacheStep) else []

    @property
    def gpu_count(self) -> int:
        return count_visible(len(self.machine.gpus))

    def _quantization(self, step: QuantizeStep) -> PlannedCell:
        source, made = self.subjects["baseline"].planned, self.subjects["candidate"].planned
        cell = PlannedCell(
            name_of(step),
            f"{self.subjects['baseline'].short} into {self.subjects['candidate'].short}",
            disk_bytes=made.weights_bytes,
        )
        rate = self._quantization_rate()
        if made.origin == "here":
            return replace(cell, done=True)
        if rate is None or source.weights_bytes is None:
            return cell
        return replace(cell, seconds=source.weights_bytes / rate)

    def _quantization_rate(self) -> float | None:
        for path in self.store.finished("quantize"):
            record = load_record(path)
            same = (record.machine.cpu, record.machine.gpus) == (self.machine.cpu, self.machine.gpus)
            if same and isinstance(record.results, QuantizeResult):
                return record.results.bytes_per_s
        return None

    def _perplexity(self, step: PerplexityStep) -> Iterator[PlannedCell]:
        roles = self.evaluation.roles(step)
        names = [self.subjects[role].name for role in roles]
        for role in reversed(roles):  # the baseline is scored first
            subject = self.subjects[role]
            spec = step.spec(subject.name, *(name for name in names if name != subject.name))
            yield self._scoring(name_of(step), spec, subject)

    def _scoring(self, step: str, spec: PerplexitySpec, subject: Subject) -> PlannedCell:
        what = f"{subject.short}, {spec.protocol.describe()}"
        cell, checkpoint = PlannedCell(step, what), subject.checkpoint
        if checkpoint is None:
            return replace(cell, unknown=NOT_HERE.format(subject.name))
        try:
            check_scorer(spec)
            cell = replace(cell, engine=choose_scorer(spec, checkpoint).engine)
            serving = serving_of(spec).model_copy(update={"engine": cell.engine, "gpus": self._device(spec)})
            geometry = predict_geometry(checkpoint, serving)
        except UsageError as error:
            return replace(cell, refused=error.what)
        text: Text | None = None
        try:
            corpus = self._corpus(spec.corpus)
            text = prepare_text(corpus, load_tokenizer(spec.tokenizer, checkpoint), spec)
        except EvalError as error:
            cell = replace(cell, unknown=f"windows are not counted: {error.what}")
        cell = replace(
            cell,
            what=what if text is None else f"{len(text.windows):,} windows of {what}",
            weights_bytes=geometry.device_bytes(spec.moe_expert_cache_size) // spec.tensor_parallel_size,
            device_bytes=self._device_bytes(serving),
            disk_bytes=_states_bytes(spec, checkpoint, text),
            done=_here(subject) and any(True for _ in finished_scores(self.store, spec, checkpoint)),
        )  # fmt: skip
        rate = self._rate(serving.gpus[0] if serving.gpus else None)
        if text is None or rate is None:
            return cell
        operations = 2 * geometry.token_weights * len(text.windows) * spec.protocol.context
        return replace(cell, seconds=operations / rate.matrix_flop_per_s / spec.tensor_parallel_size)

    def _speed(self, step: SpeedStep) -> Iterator[PlannedCell]:
        chosen = [self.subjects[role] for role in self.evaluation.roles(step)]
        sweep = step.sweep([subject.name for subject in chosen], self.gpu_count)
        missing = [subject.name for subject in chosen if subject.checkpoint is None]
        if missing:
            yield PlannedCell(name_of(step), "a sweep", unknown=NOT_HERE.format(missing[0]))
            return
        by_name = {subject.name: subject for subject in chosen}
        checkpoints = {s.name: s.checkpoint for s in chosen if s.checkpoint is not None}
        try:
            check_cache_sizes(checkpoints[chosen[0].name], sweep.axes.cache_sizes)
            axes = available_modes(sweep, checkpoints)
        except UsageError as error:
            yield PlannedCell(name_of(step), "a sweep", refused=error.what)
            axes = sweep.axes
        planned = cells(axes, sweep.serving, sweep.workload)
        planned += [
            cell
            for cell in reference_cells(axes, sweep.serving, sweep.workload)
            if _runs(cell, checkpoints[cell.model], self.machine)
        ]
        for cell in planned:
            yield self._cell(name_of(step), label(cell), cell, cell, by_name[cell.model])

    def _footprint(self, step: FootprintStep) -> Iterator[PlannedCell]:
        for role in self.evaluation.roles(step):
            subject = self.subjects[role]
            spec = step.spec(subject.name)
            gpus = spec.serving.gpus or tuple(range(min(self.gpu_count, spec.serving.tensor_parallel_size)))
            eager = spec.serving.enforce_eager or not gpus
            serving = spec.serving.model_copy(update={"gpus": gpus, "enforce_eager": eager})
            cell = SpeedSpec(model=spec.model, serving=serving, workload=spec.workload)
            if subject.checkpoint is None:
                yield PlannedCell(name_of(step), label(cell), unknown=NOT_HERE.format(subject.name))
            else:
                yield self._cell(name_of(step), label(cell), spec, cell, subject)

    def _cell(
        self, step: str, what: str, spec: SpeedSpec | FootprintSpec, cell: SpeedSpec, subject: Subject
    ) -> PlannedCell:
        """A cell of a sweep, or a footprint as the cell that it is like."""
        checkpoint = subject.checkpoint
        assert checkpoint is not None
        serving, workload = cell.serving, cell.workload
        found = PlannedCell(step, what, device_bytes=self._device_bytes(serving))
        try:
            refuse_cell(cell, checkpoint, self.machine)
        except EvalError as error:
            found = replace(found, refused=error.what)
            try:
                geometry = read_geometry(checkpoint, "bfloat16")
            except EvalError:
                return found
            return replace(found, **_sizes(geometry, cell))
        (one,) = forecast([cell], {cell.model: checkpoint}, self.machine, self._bandwidth)
        rounds = workload.repeats + workload.warmups
        idle_s = spec.idle_s if isinstance(spec, FootprintSpec) else 0.0
        return replace(
            found, engine=one.engine, weights_bytes=one.weights_bytes, request_bytes=one.request_bytes,
            seconds=None if one.tokens_per_s is None
            else idle_s + rounds * workload.output_len / one.tokens_per_s,
            unknown=one.absent if self.bandwidth_of else "", done=self._measured(spec, subject),
        )  # fmt: skip

    def _measured(self, spec: SpeedSpec | FootprintSpec, subject: Subject) -> bool:
        if not _here(subject):
            return False
        try:
            corpus = self._corpus(spec.workload.corpus)
        except EvalError:
            return False
        ready = prepare(spec.model, spec.serving, spec.workload, corpus)
        return finished_cell(self.store, spec, ready, self.machine) is not None

    def _trace(self, step: CacheStep) -> PlannedCell:
        step.prediction()  # refuses what belongs to no GPU
        subject = self.subjects["candidate"]
        tokens = step.requests * (step.input_len + step.output_len)
        cell = PlannedCell(name_of(step), f"trace of {subject.short}, {tokens:,} tokens", step.engine)
        if subject.checkpoint is None:
            return replace(cell, unknown=NOT_HERE.format(subject.name))
        try:
            request = step.request(subject.name)
            expert_geometry(subject.checkpoint)  # refuses a dense model
        except EvalError as error:
            return replace(cell, refused=error.what)
        done = (trace_folder(self.work, request, subject.checkpoint) / TRACE_FILE).exists()
        held = read_geometry(subject.checkpoint, "bfloat16", dequantised=step.engine == "torch")
        serving = Serving(gpus=(0,) if self.gpu_count else (), enforce_eager=True)
        return replace(
            cell, weights_bytes=held.total_bytes, device_bytes=self._device_bytes(serving), done=done
        )

    def _device(self, spec: PerplexitySpec) -> tuple[int, ...]:
        place, _, index = spec.device.partition(":")
        if place == "cuda":
            return (int(index),)
        return (0,) if place == "auto" and self.gpu_count else ()

    def _device_bytes(self, serving: Serving) -> int | None:
        """Of each device that it runs on; of a GPU that is not here nothing is known."""
        if not serving.gpus:
            return None if not serving.enforce_eager and not self.gpu_count else self.machine.ram_bytes
        there = [self.machine.gpus[gpu].memory_bytes for gpu in serving.gpus if gpu < len(self.machine.gpus)]
        return min(there) if len(there) == len(serving.gpus) else None

    def _corpus(self, name: str) -> Corpus:
        """Asked for once: a hub that does not answer takes half a minute to say so."""
        if name not in self._corpora:
            try:
                self._corpora[name] = load_corpus(name)
            except EvalError as error:
                self._corpora[name] = error
        found = self._corpora[name]
        if isinstance(found, EvalError):
            raise found
        return found

    def _rate(self, gpu: int | None) -> Bandwidth | None:
        try:
            return None if self.bandwidth_of is None else self._bandwidth(gpu)
        except EvalError:
            return None

    def _bandwidth(self, gpu: int | None) -> Bandwidth:
        if self.bandwidth_of is None:
            raise UsageError("times were not asked for")
        if gpu not in self._rates:
            try:
                self._rates[gpu] = self.bandwidth_of(gpu)
            except EvalError as error:
                self._rates[gpu] = error
        found = self._rates[gpu]
        if isinstance(found, EvalError):
            raise found
        return found


def _here(subject: Subject) -> bool:
    return subject.planned.origin == "here"


def _sizes(geometry: Geometry, cell: SpeedSpec) -> dict[str, int]:
    workload, devices = cell.workload, cell.serving.tensor_parallel_size
    requests = geometry.request_bytes(workload.concurrency, workload.input_len + workload.output_len)
    weights = geometry.device_bytes(cell.serving.moe_expert_cache_size)
    return {"weights_bytes": weights // devices, "request_bytes": requests // devices}


def _states_bytes(spec: PerplexitySpec, checkpoint: Checkpoint, text: Text | None) -> int | None:
    """Hidden states of the scored positions, and the head, as two bytes a number."""
    width, vocabulary = (config_value(checkpoint, name) for name in ("hidden_size", "vocab_size"))
    if not spec.keep_hidden or text is None or width is None or vocabulary is None:
        return None
    return 2 * width * (sum(window.scored for window in text.windows) + vocabulary)


def _runs(cell: SpeedSpec, checkpoint: Checkpoint, machine: Machine) -> bool:
    try:
        return fits(cell, checkpoint, machine) is not False
    except EvalError:
        return False
