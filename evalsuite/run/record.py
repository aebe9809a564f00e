"""What every record of a run has, whatever its kind."""

from evalsuite.core.record import Machine, Record, Status
from evalsuite.core.spec import Spec, spec_hash
from evalsuite.store.folder import RunFolder
from evalsuite.store.runs import utc_now
from evalsuite.telemetry.machine import read_machine


def new_record(folder: RunFolder, spec: Spec, status: Status, machine: Machine | None = None) -> Record:
    """The record of a run that ends now, without its results.

    Args:
        machine: where it is known already; else it is read.
    """
    return Record(
        run_id=folder.run_id,
        kind=spec.kind,
        status=status,
        started=folder.started,
        finished=utc_now(),
        spec=spec.model_dump(mode="json"),
        spec_hash=spec_hash(spec),
        machine=machine or read_machine(),
    )
