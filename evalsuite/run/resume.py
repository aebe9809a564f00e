"""Which cells of a sweep are finished already, under the conditions of now."""

from evalsuite.core.record import Machine, Record
from evalsuite.core.spec import SpeedSpec, spec_hash
from evalsuite.run.perplexity import Finished
from evalsuite.run.subject import Subject
from evalsuite.store.runs import RunStore, load_record

DECIDES = ("torch", "vllm", "transformers", "triton")  # packages that can change a speed


def finished_cell(store: RunStore, cell: SpeedSpec, subject: Subject, machine: Machine) -> Finished | None:
    """The newest run of this cell that succeeded with these weights and prompts, on such a machine.

    Another GPU model, driver or version of what computes makes another measurement, which stands beside the
    old one.
    """
    for path in store.finished(cell.kind, subject.checkpoint.slug, spec_hash(cell)):
        record = load_record(path)
        if record.status == "ok" and _same_conditions(record, subject, machine):
            return Finished(path, record)
    return None


def _same_conditions(record: Record, subject: Subject, machine: Machine) -> bool:
    return (
        record.model is not None
        and record.model.fingerprint == subject.fingerprint
        and record.text == subject.text
        and _speed_of(record.machine) == _speed_of(machine)
    )


def _speed_of(machine: Machine) -> tuple[object, ...]:
    packages = tuple(machine.packages.get(name) for name in DECIDES)
    return machine.cpu, machine.gpus, machine.gpu_driver, packages
