"""Which runs are finished already, under the conditions of now."""

from collections.abc import Iterator

from evalsuite.core.record import CompareResult, Machine, QuantizeResult, Record
from evalsuite.core.spec import (
    CompareSpec,
    FootprintSpec,
    PerplexitySpec,
    QuantizeSpec,
    SpeedSpec,
    spec_hash,
)
from evalsuite.data.models import Checkpoint
from evalsuite.run.perplexity import HIDDEN_AND_HEAD, Finished
from evalsuite.run.subject import Subject
from evalsuite.store.runs import RunStore, load_record

DECIDES = ("torch", "vllm", "transformers", "triton")  # packages that can change a speed


def finished_cell(
    store: RunStore, cell: SpeedSpec | FootprintSpec, subject: Subject, machine: Machine
) -> Finished | None:
    """The newest run of this spec that succeeded with these weights and prompts, on such a machine.

    Another GPU model, driver, version of what computes, or variable that it reads makes another measurement,
    which stands beside the old one.
    """
    devices = cell.serving.tensor_parallel_size
    for path in store.finished(cell.kind, subject.checkpoint.slug, spec_hash(cell)):
        record = load_record(path)
        if record.status == "ok" and _same_conditions(record, subject, machine, devices):
            return Finished(path, record)
    return None


def finished_scores(store: RunStore, spec: PerplexitySpec, checkpoint: Checkpoint) -> Iterator[Finished]:
    """Runs that scored these weights by this spec, newest first."""
    fingerprint = checkpoint.fingerprint()
    for path in store.finished(spec.kind, checkpoint.slug, spec_hash(spec)):
        record = load_record(path)
        if record.status == "ok" and record.model is not None and record.model.fingerprint == fingerprint:
            yield Finished(path, record)


def finished_comparison(
    store: RunStore, baseline: Finished, candidate: Finished, *, divergence: bool = True
) -> Finished | None:
    """The newest comparison of two runs.

    Args:
        divergence: only one that has a divergence will do.
    """
    spec = CompareSpec(baseline=baseline.record.run_id, candidate=candidate.record.run_id)
    for path in store.finished(spec.kind, candidate.path.parent.name, spec_hash(spec)):
        record = load_record(path)
        if isinstance(record.results, CompareResult) and (record.results.divergence or not divergence):
            return Finished(path, record)
    return None


def finished_quantization(
    store: RunStore, spec: QuantizeSpec, source: str, destination: str
) -> QuantizeResult | None:
    """How a checkpoint was quantized.

    Args:
        source, destination: names of the two folders.
    """
    for path in store.finished(spec.kind, source, spec_hash(spec)):
        result = load_record(path).results
        if isinstance(result, QuantizeResult) and result.destination == destination:
            return result
    return None


def has_states(finished: Finished) -> bool:
    """Whether a run kept what a divergence needs."""
    return all((finished.path / name).is_file() for name in HIDDEN_AND_HEAD)


def _same_conditions(record: Record, subject: Subject, machine: Machine, devices: int) -> bool:
    return (
        record.model is not None
        and record.model.fingerprint == subject.fingerprint
        and record.text == subject.text
        and _speed_of(record.machine, devices) == _speed_of(machine, devices)
    )


def _speed_of(machine: Machine, devices: int) -> tuple[object, ...]:
    packages = tuple(machine.packages.get(name) for name in DECIDES)
    return machine.cpu, machine.gpus, machine.gpu_driver, machine.variables(devices), packages
