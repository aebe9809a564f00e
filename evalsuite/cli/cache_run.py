"""What `cache` does once its flags are read: runs, tables, pictures and files beside the trace."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from evalsuite.cli.show import Screen
from evalsuite.core.errors import UsageError
from evalsuite.core.geometry import Geometry
from evalsuite.data.models import Checkpoint, find_checkpoint
from evalsuite.experts.belady import Belady
from evalsuite.experts.gpus import GPUS, GpuSheet, gpus_of
from evalsuite.experts.predict import Measured, Prediction, Routing, largest_cache, predict, uniform_routing
from evalsuite.experts.simulate import check_policies
from evalsuite.experts.simulation import Simulation, Simulator
from evalsuite.experts.trace import Trace, TraceFacts, load_trace
from evalsuite.report.cache import GpuRow, gpu_table, hit_rate_table, layer_table, trace_table
from evalsuite.report.cache_plots import SpeedCurve, expert_use, hit_rates, predicted_speeds
from evalsuite.report.tables import Table
from evalsuite.run.trace import TRACE_FILE, TraceRequest, expert_geometry, run_trace
from evalsuite.store.derived import AGAIN, write_derived
from evalsuite.store.folder import storage_errors

CURVE_POINTS = 24
ALL_GPUS = "all"


@dataclass(frozen=True)
class PredictionRequest:
    """For which GPUs and which model, and what was measured of the GPU."""

    gpus: Sequence[str]
    geometry: str | None
    context: int
    compute_s: float | None
    transfer_bytes_per_s: float | None


def make_trace(screen: Screen, request: TraceRequest, out: Path, *, replace: bool) -> None:
    """Trace, show what was recorded, and draw who uses which expert."""
    with _tracing(screen) as progress:
        path = run_trace(request, out, progress, replace=replace)
    trace = load_trace(path)
    screen.table(trace_table(trace))
    picture = _draw_use(trace, out)
    screen.note(f"trace: {path}")
    screen.note(f"picture: {picture}")
    screen.note(f"next: hlwq-eval cache simulate {out}")
    screen.document({"path": str(path), **trace.facts.model_dump(mode="json")})


def run_simulation(
    screen: Screen,
    path: Path,
    *,
    sizes: Sequence[int | None],
    policies: Sequence[str],
    model: str | None,
    prediction: PredictionRequest | None,
    results: Path | None,
) -> None:
    """Simulate, predict where asked, and write everything beside the trace or into `results`."""
    check_policies(policies)
    sheets = _gpus(prediction)
    path = path / TRACE_FILE if path.is_dir() else path
    trace = load_trace(path)
    if model is not None:
        checkpoint = find_checkpoint(model, weights=not trace.facts.dummy)
        trace.require_model(checkpoint.name, checkpoint.fingerprint())
    target = None if prediction is None else _target(prediction, trace)
    experts = trace.facts.geometry.experts
    for size in sizes:
        if size is not None and size > experts:
            screen.warn(f"a cache of {size} for {experts} experts a layer: every expert is resident.")
    out = results or path.parent
    with storage_errors(out, AGAIN):
        out.mkdir(parents=True, exist_ok=True)
    simulator = Simulator(trace)
    within = sorted({min(size or experts, experts) for size in sizes})
    simulation = simulator.run(policies, within)
    tables: list[Table[Any]] = [hit_rate_table(simulation), layer_table(simulation, policies[0])]
    screen.table(tables[0])
    pictures = [_draw_hit_rates(simulator, policies, out), _draw_use(trace, out)]
    document: dict[str, Any] = simulation.model_dump(mode="json")
    if prediction is not None and target is not None:
        rows, curves = _predict(simulator, simulation, prediction, sheets, target, sizes)
        tables.append(
            gpu_table(
                rows, target.geometry, target.name, prediction.context, _measured(prediction), trace.facts
            )
        )
        screen.table(tables[-1])
        pictures.append(_draw_speeds(curves, target, rows[-1].predictions[-1].routing, prediction, out))
        document["predictions"] = [one.model_dump(mode="json") for row in rows for one in row.predictions]
        document["predicted_model"] = target.name
    text = "\n\n".join(f"## {table.title}\n\n{table.to_markdown()}" for table in tables)
    written = [
        write_derived(out / "simulation.json", json.dumps(document, indent=1, allow_nan=False) + "\n"),
        write_derived(out / "simulation.md", text + "\n"),
    ]
    screen.note("files: " + ", ".join(str(file) for file in written))
    screen.note("pictures: " + ", ".join(str(picture) for picture in pictures))
    screen.document(document)


@dataclass(frozen=True)
class _Target:
    name: str
    geometry: Geometry


def _gpus(prediction: PredictionRequest | None) -> list[GpuSheet]:
    if prediction is None:
        return []
    sheets = gpus_of(list(GPUS) if list(prediction.gpus) == [ALL_GPUS] else prediction.gpus)
    if len(sheets) > 1 and _measured(prediction) != Measured():
        raise UsageError(
            "A measured time or bandwidth is of one GPU.", todo="give one --gpu with it, or leave it out."
        )
    return sheets


def _measured(prediction: PredictionRequest) -> Measured:
    return Measured(prediction.compute_s, prediction.transfer_bytes_per_s)


def _target(prediction: PredictionRequest, trace: Trace) -> _Target:
    """The model that predictions are for: its sizes as its checkpoint stores them."""
    if prediction.geometry is None:
        target = _Target(trace.facts.model, trace.facts.geometry)
    else:
        checkpoint: Checkpoint = find_checkpoint(prediction.geometry, weights=False)
        target = _Target(checkpoint.name, expert_geometry(checkpoint))
    longest = target.geometry.context
    if longest is not None and prediction.context > longest:
        raise UsageError(
            f"{target.name} has a context of {longest:,} tokens, not {prediction.context:,}.",
            todo=f"give --context {longest} or less.",
        )
    return target


def _predict(
    simulator: Simulator,
    simulation: Simulation,
    request: PredictionRequest,
    sheets: Sequence[GpuSheet],
    target: _Target,
    sizes: Sequence[int | None],
) -> tuple[list[GpuRow], list[SpeedCurve]]:
    geometry, measured = target.geometry, _measured(request)
    policy = next((p for p in simulation.policies if p != Belady.name), Belady.name)
    routings = (uniform_routing(geometry.experts), simulator.routing(policy, geometry.experts))
    wanted = sorted({min(size or geometry.experts, geometry.experts) for size in sizes})
    rows: list[GpuRow] = []
    curves: list[SpeedCurve] = []
    for gpu in sheets:
        largest = largest_cache(geometry, gpu.memory_bytes, request.context)

        def at(size: int, routing: Routing, gpu: GpuSheet = gpu) -> Prediction:
            return predict(geometry, gpu, size, routing, request.context, measured)

        rows += [
            GpuRow(gpu, size == largest, [at(size, routing) for routing in routings])
            for size in sorted(set(wanted) if largest is None else {*wanted, largest})
        ]
        if largest is not None:
            grid = [size for size in _grid(geometry.experts) if size < largest] + [largest]
            speeds = [at(size, routings[-1]).tokens_per_s for size in grid]
            curves.append(SpeedCurve(gpu.name, grid, speeds))
    return rows, curves


def _grid(experts: int) -> list[int]:
    """Sizes at even distances on a logarithmic axis, 1 and all of them included."""
    return sorted({int(size) for size in np.geomspace(1, experts, CURVE_POINTS).round()})


def _draw_hit_rates(simulator: Simulator, policies: Sequence[str], out: Path) -> Path:
    facts = simulator.trace.facts
    geometry = facts.geometry
    simulated = simulator.run(policies, _grid(geometry.experts))
    rates = {
        policy: {
            size: rate
            for size in simulated.sizes
            if (rate := simulated.cell(policy, size, "decode").counters.hit_rate) is not None
        }
        for policy in policies
    }
    with storage_errors(out, AGAIN):
        return hit_rates(
            rates, geometry.experts, geometry.top_k,
            f"Expert cache of {facts.model}: decode hit rate",
            f"Simulated on a trace of {_weights(facts)} on {facts.corpus}, "
            f"{simulator.trace.tokens('decode'):,} decoded tokens, {len(facts.layers)} expert layers "
            "together; the cache starts empty. Left of the dotted line steps overflow, and there Belady's "
            "choice is not proven to be the best.",
            out / "hit_rates",
        )[0]  # fmt: skip


def _weights(facts: TraceFacts) -> str:
    return "random weights" if facts.dummy else facts.model


def _draw_use(trace: Trace, out: Path) -> Path:
    facts = trace.facts
    experts = facts.geometry.experts
    counts = np.stack(
        [np.bincount(trace.chosen[:, i].ravel(), minlength=experts) for i in range(len(facts.layers))]
    )
    with storage_errors(out, AGAIN):
        return expert_use(
            counts, facts.layers, f"Expert use of {facts.model} by layer",
            f"Trace of {_weights(facts)} on {facts.corpus}: "
            f"{trace.tokens('all'):,} tokens, prefill and decode. 1 is what every expert would have if all "
            "were used alike.",
            out / "expert_use",
        )[0]  # fmt: skip


def _draw_speeds(
    curves: Sequence[SpeedCurve], target: _Target, routing: str, request: PredictionRequest, out: Path
) -> Path:
    with storage_errors(out, AGAIN):
        return predicted_speeds(
            curves, target.geometry.experts, target.geometry.top_k,
            f"Expert cache of {target.name}: predicted speed",
            f"Derived, not measured; one sequence of {request.context:,} tokens. Hit rates: {routing}. "
            "Lines end at the largest cache that fits. The table says how it is derived.",
            out / "predicted_speeds",
        )[0]  # fmt: skip


class _LiveTrace:
    """A bar on a terminal; a line a request where standard error is a file."""

    def __init__(self, screen: Screen, bar: Progress) -> None:
        self._screen, self._bar, self._task = screen, bar, None

    def phase(self, text: str) -> None:
        self._screen.note(f"{text} …")

    def traced(self, done: int, total: int) -> None:
        if not self._screen.error.is_terminal:
            self._screen.note(f"{done:,} of {total:,} requests")
            return
        task: Any = self._task
        if task is None:
            task = self._task = self._bar.add_task("requests", total=total)
        self._bar.update(task, completed=done)


@contextmanager
def _tracing(screen: Screen) -> Iterator[_LiveTrace]:
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=screen.error,
    ) as bar:  # fmt: skip
        yield _LiveTrace(screen, bar)
