"""From a trace's hit rates and a model's sizes to what an expert cache would give on GPUs by name."""

from collections.abc import Sequence

from pydantic import Field, PositiveInt

from evalsuite.core.errors import UsageError
from evalsuite.core.geometry import Geometry
from evalsuite.core.value import Value
from evalsuite.data.models import find_checkpoint
from evalsuite.experts.belady import Belady
from evalsuite.experts.gpus import GPUS, GpuSheet, gpus_of
from evalsuite.experts.predict import Measured, Prediction, Routing, largest_cache, predict, uniform_routing
from evalsuite.experts.simulation import Simulator
from evalsuite.experts.trace import TraceFacts
from evalsuite.report.cache import GpuRow
from evalsuite.report.cache_plots import SpeedCurve
from evalsuite.run.trace import expert_geometry

ALL_GPUS = "all"


class PredictionRequest(Value):
    """What is predicted.

    Attributes:
        gpus: keys of `evalsuite.experts.gpus.GPUS`, or ``all`` alone.
        model: whose sizes are taken, a configuration is enough; None takes the traced model's.
        context: tokens of the sequence.
        compute_s, transfer_bytes_per_s: measured on the GPU, which is then the only one.
    """

    gpus: tuple[str, ...]
    model: str | None = None
    context: PositiveInt = 4096
    compute_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    transfer_bytes_per_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @property
    def measured(self) -> Measured:
        return Measured(self.compute_s, self.transfer_bytes_per_s)

    def sheets(self) -> list[GpuSheet]:
        """The GPUs' data sheets.

        Raises:
            UsageError: there is no such GPU here, or several and a measurement.
        """
        found = gpus_of(list(GPUS) if self.gpus == (ALL_GPUS,) else self.gpus)
        if len(found) > 1 and self.measured != Measured():
            raise UsageError(
                "A measured time or bandwidth is of one GPU.",
                todo="give one --gpu with it, or leave it out.",
            )
        return found


class Target(Value):
    """The model that is to run: its sizes as its checkpoint stores them."""

    name: str
    geometry: Geometry


def find_target(request: PredictionRequest, traced: TraceFacts) -> Target:
    """The model that predictions are for.

    Raises:
        ModelError: there is none of that name, or its sizes are not known here.
        UsageError: it is dense, or its context is shorter than the request's.
    """
    if request.model is None:
        target = Target(name=traced.model, geometry=traced.geometry)
    else:
        checkpoint = find_checkpoint(request.model, weights=False)
        target = Target(name=checkpoint.name, geometry=expert_geometry(checkpoint))
    longest = target.geometry.context
    if longest is not None and request.context > longest:
        raise UsageError(
            f"{target.name} has a context of {longest:,} tokens, not {request.context:,}.",
            todo=f"give --context {longest} or less.",
        )
    return target


def predictions(
    simulator: Simulator,
    policies: Sequence[str],
    request: PredictionRequest,
    target: Target,
    sizes: Sequence[int | None],
    grid: Sequence[int],
) -> tuple[list[GpuRow], list[SpeedCurve]]:
    """Every size, and the largest that fits, on every GPU; and a curve over `grid` as far as it fits.

    Hit rates are those of uniform routing, and of the trace under the first policy that an engine can run.

    Args:
        sizes: experts a layer, None for all of them.
    """
    geometry = target.geometry
    every = geometry.experts
    policy = next((name for name in policies if name != Belady.name), Belady.name)
    routings = (uniform_routing(every), simulator.routing(policy, every))
    wanted = {min(size or every, every) for size in sizes}
    rows: list[GpuRow] = []
    curves: list[SpeedCurve] = []
    for gpu in request.sheets():
        largest = largest_cache(geometry, gpu.memory_bytes, request.context)

        def at(size: int, routing: Routing, gpu: GpuSheet = gpu) -> Prediction:
            return predict(geometry, gpu, size, routing, request.context, request.measured)

        rows += [
            GpuRow(gpu, size == largest, [at(size, routing) for routing in routings])
            for size in sorted(wanted if largest is None else {*wanted, largest})
        ]
        if largest is not None:
            steps = [size for size in grid if size < largest] + [largest]
            speeds = [at(size, routings[-1]).tokens_per_s for size in steps]
            curves.append(SpeedCurve(gpu.name, steps, speeds))
    return rows, curves
