"""A sweep before it runs: what is refused at once, and what each cell will take."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from evalsuite.core.bandwidth import Bandwidth
from evalsuite.core.errors import EvalError, UsageError
from evalsuite.core.forecast import Forecast
from evalsuite.core.geometry import Geometry
from evalsuite.core.record import Machine
from evalsuite.core.spec import Serving, SpeedSpec
from evalsuite.core.sweep import Axes
from evalsuite.data.models import Checkpoint
from evalsuite.engines.predict import has_graphs, predict_geometry, require_graphs
from evalsuite.engines.select import choose_engine
from evalsuite.run.options import Sweep
from evalsuite.run.subject import Subject
from evalsuite.telemetry.gpu import count_visible, visible_gpus

DEVICE_UNKNOWN = "a server that runs already does not tell its device"


def refuse_impossible(chosen: Sequence[SpeedSpec], subjects: dict[str, Subject], machine: Machine) -> None:
    """Raises UsageError for the first cell that no engine on this machine can run as it was asked for."""
    for cell in chosen:
        refuse_cell(cell, subjects[cell.model].checkpoint, machine)
        subjects[cell.model].prompts(cell.workload)


def refuse_cell(cell: SpeedSpec, checkpoint: Checkpoint, machine: Machine) -> None:
    """Raises UsageError where no engine on this machine can run the cell, whatever its prompts are."""
    serving = cell.serving
    refuse_missing_gpus(serving, machine)
    if serving.tensor_parallel_size > max(1, len(serving.gpus)) and serving.server_url is None:
        raise UsageError(
            f"--tensor-parallel-size {serving.tensor_parallel_size} needs as many GPUs, and this machine "
            f"has {len(machine.gpus)}.",
            todo="give a smaller size.",
        )
    choose_engine(serving, checkpoint)
    if not serving.enforce_eager and serving.server_url is None:
        require_graphs(checkpoint, serving, bool(machine.gpus))


def available_modes(sweep: Sweep, checkpoints: Mapping[str, Checkpoint]) -> Axes:
    """The axes, with eager mode alone where no mode was asked for and an engine has no CUDA graphs."""
    if sweep.any_mode and not all(has_graphs(one, sweep.serving) for one in checkpoints.values()):
        return sweep.axes.model_copy(update={"modes": ("eager",)})
    return sweep.axes


def refuse_missing_gpus(serving: Serving, machine: Machine) -> None:
    """Raises UsageError for a GPU that the machine has not, or that CUDA_VISIBLE_DEVICES hides."""
    count = count_visible(len(machine.gpus))
    if missing := [gpu for gpu in serving.gpus if gpu >= count]:
        raise UsageError(
            f"There is no GPU {missing[0]}: this machine has {count or 'none'} that can be used.",
            todo="choose others with --gpus, or leave it out; `hlwq-eval doctor` lists them.",
        )


def forecast(
    chosen: Sequence[SpeedSpec],
    checkpoints: Mapping[str, Checkpoint],
    machine: Machine,
    bandwidth_of: Callable[[int | None], Bandwidth],
) -> list[Forecast]:
    """Predict every cell from its model's configuration."""
    return [_predict(cell, checkpoints[cell.model], machine, bandwidth_of) for cell in chosen]


def _predict(
    cell: SpeedSpec,
    checkpoint: Checkpoint,
    machine: Machine,
    bandwidth_of: Callable[[int | None], Bandwidth] | None,
) -> Forecast:
    serving, workload = cell.serving, cell.workload
    name, _ = choose_engine(serving, checkpoint)
    if serving.server_url is not None:
        return Forecast(cell, name, absent=DEVICE_UNKNOWN)
    gpu = serving.gpus[0] if serving.gpus else None
    try:
        geometry = predict_geometry(checkpoint, serving)
    except EvalError as error:
        return Forecast(cell, name, absent=error.what)
    devices, size = serving.tensor_parallel_size, serving.moe_expert_cache_size
    requests = geometry.request_bytes(workload.concurrency, workload.input_len + workload.output_len)
    found = Forecast(
        cell,
        name,
        weights_bytes=geometry.device_bytes(size) // devices,
        request_bytes=requests // devices,
        device_bytes=machine.ram_bytes if gpu is None else machine.gpus[_index(gpu)].memory_bytes,
    )
    if bandwidth_of is None:
        return found
    try:
        bandwidth = bandwidth_of(gpu)
    except EvalError as error:
        return replace(found, absent=error.what)
    step = geometry.step_bytes(workload.concurrency, workload.input_len + workload.output_len / 2)
    least_s = step / devices / bandwidth.copy_bytes_per_s
    copied_s = _copied_bytes(geometry, workload.concurrency) / devices / _transfer(bandwidth)
    return replace(
        found,
        tokens_per_s=1 / least_s,
        all_misses_tokens_per_s=None if size is None else 1 / (least_s + copied_s),
    )


def fits(cell: SpeedSpec, checkpoint: Checkpoint, machine: Machine) -> bool | None:
    """Whether a cell's weights and requests are less than its device has; None where that is not known."""
    return _predict(cell, checkpoint, machine, None).fits


def _index(gpu: int) -> int:
    """In the driver's count, of one among the visible GPUs."""
    return visible_gpus((gpu,), 1)[0]


def _copied_bytes(geometry: Geometry, sequences: int) -> float:
    return geometry.distinct_experts(sequences) * geometry.expert_layers * geometry.expert_bytes


def _transfer(bandwidth: Bandwidth) -> float:
    return bandwidth.transfer_pieces_bytes_per_s or bandwidth.copy_bytes_per_s
