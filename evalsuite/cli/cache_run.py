"""What `cache` does once its flags are read: runs, tables, pictures and files beside the trace."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from evalsuite.cli.show import Screen
from evalsuite.data.models import find_checkpoint
from evalsuite.experts.simulate import check_policies
from evalsuite.experts.simulation import Simulator
from evalsuite.experts.trace import Trace, TraceFacts, load_trace
from evalsuite.report.cache import gpu_table, hit_rate_table, layer_table, trace_table
from evalsuite.report.cache_plots import SpeedCurve, expert_use, hit_rates, predicted_speeds
from evalsuite.report.tables import Table
from evalsuite.run.cache_options import SimulationOptions
from evalsuite.run.cache_prediction import PredictionRequest, Target, find_target, predictions
from evalsuite.run.trace import TRACE_FILE, TraceRequest, run_trace
from evalsuite.store.derived import AGAIN, write_derived
from evalsuite.store.folder import storage_errors

CURVE_POINTS = 24


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
    options: SimulationOptions,
    *,
    model: str | None,
    results: Path | None,
) -> None:
    """Simulate, predict where asked, and write everything beside the trace or into `results`.

    Args:
        model: refuse the trace unless it is of this one.
    """
    sizes, policies, prediction = options.slots, options.policies, options.prediction()
    check_policies(policies)
    if prediction is not None:
        prediction.sheets()  # refuses before the trace is read
    path = path / TRACE_FILE if path.is_dir() else path
    trace = load_trace(path)
    if model is not None:
        checkpoint = find_checkpoint(model, weights=not trace.facts.dummy)
        trace.require_model(checkpoint.name, checkpoint.fingerprint())
    target = None if prediction is None else find_target(prediction, trace.facts)
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
        rows, curves = predictions(
            simulator, policies, prediction, target, sizes, _grid(target.geometry.experts)
        )
        tables.append(
            gpu_table(
                rows, target.geometry, target.name, prediction.context, prediction.measured, trace.facts
            )
        )
        screen.table(tables[-1])
        if curves:
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


def _grid(experts: int) -> list[int]:
    """Sizes at even distances on a logarithmic axis, 1 and all of them included."""
    return sorted({int(size) for size in np.geomspace(1, experts, CURVE_POINTS).round()})


def _draw_hit_rates(simulator: Simulator, policies: Sequence[str], out: Path) -> Path:
    facts = simulator.trace.facts
    geometry = facts.geometry
    simulated = simulator.run(policies, sorted({geometry.top_k, *_grid(geometry.experts)}))
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
    curves: Sequence[SpeedCurve], target: Target, routing: str, request: PredictionRequest, out: Path
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
