"""The tables of an expert cache: what was simulated on a trace, and what follows for GPUs nobody measured."""

from collections.abc import Sequence
from dataclasses import dataclass

from evalsuite.core.cache import LayerCounters
from evalsuite.core.geometry import Geometry
from evalsuite.core.units import si_bytes
from evalsuite.experts.belady import Belady
from evalsuite.experts.gpus import GpuSheet
from evalsuite.experts.predict import RESERVE_BYTES, Measured, Prediction
from evalsuite.experts.simulation import SimulatedCell, Simulation
from evalsuite.experts.trace import Trace, TraceFacts
from evalsuite.report.tables import NOT_MEASURED, Cell, Column, Table

Pair = tuple[str, str]
DUMMY = "random weights: its routing says nothing about the model"


@dataclass(frozen=True)
class PolicyRow:
    """One size and policy, decode beside prefill."""

    decode: SimulatedCell
    prefill: SimulatedCell


@dataclass(frozen=True)
class GpuRow:
    """One cache size on one GPU, predicted under each assumption about routing; the memory is the same."""

    gpu: GpuSheet
    is_largest: bool
    predictions: Sequence[Prediction]

    @property
    def any(self) -> Prediction:
        return self.predictions[0]


def trace_table(trace: Trace) -> Table[Pair]:
    """What a trace holds."""
    facts, geometry = trace.facts, trace.facts.geometry
    steps = trace.step_is_prefill()
    rows: list[Pair] = [
        ("weights", "random (dummy)" if facts.dummy else f"{facts.model}, {facts.fingerprint[:12]}"),
        ("expert layers", f"{len(facts.layers)}"),
        ("experts a layer, chosen by a token", f"{geometry.experts}, {geometry.top_k}"),
        ("one expert", si_bytes(geometry.expert_bytes)),
        ("tokens: prefill, decode", f"{trace.tokens('prefill'):,}, {trace.tokens('decode'):,}"),
        ("steps: prefill, decode", f"{int(steps.sum()):,}, {int((~steps).sum()):,}"),
        ("prompts", f"{facts.input_len} tokens in, {facts.output_len} out, {facts.concurrency} at once"),
        ("engine", f"{facts.engine}, {facts.computed}"),
    ]
    return Table(
        f"Routing of {facts.model} on {facts.corpus}",
        (Column[Pair]("quantity", lambda r: r[0]), Column[Pair]("value", lambda r: r[1])),
        rows,
        "A step is one forward pass. The last token of an output goes through no layer.",
    )


def hit_rate_table(simulation: Simulation) -> Table[PolicyRow]:
    """Every size and policy."""
    facts = simulation.trace
    rows = [
        PolicyRow(simulation.cell(policy, size, "decode"), simulation.cell(policy, size, "prefill"))
        for size in simulation.sizes
        for policy in simulation.policies
    ]
    bound = " belady knows the future: no policy can do better where every step fits." * (
        Belady.name in simulation.policies
    )
    return Table(
        f"Expert cache of {facts.model}, simulated",
        (
            Column[PolicyRow]("experts on the device", lambda r: _size(r, facts)),
            Column[PolicyRow]("policy", lambda r: r.decode.counters.policy),
            Column[PolicyRow]("decode hit rate", lambda r: _rate(r.decode), "%", "higher"),
            Column[PolicyRow]("misses a token", lambda r: _misses(r.decode), better="lower"),
            Column[PolicyRow]("moved a token", lambda r: _moved(r.decode), better="lower"),
            Column[PolicyRow]("overflow steps", lambda r: _overflow(r.decode)),
            Column[PolicyRow]("prefill hit rate", lambda r: _rate(r.prefill), "%", "higher"),
            Column[PolicyRow]("moved a token", lambda r: _moved(r.prefill), better="lower"),
            Column[PolicyRow]("overflow steps", lambda r: _overflow(r.prefill)),
        ),
        rows,
        f"{_source(facts)}; all {len(facts.layers)} expert layers together, one expert "
        f"{si_bytes(facts.geometry.expert_bytes)}. Columns 3 to 6 are decode, 7 to 9 prefill. Every distinct "
        "expert of a step counts once, in overflow steps too (those that need more experts than there are "
        f"slots, counted over layers); the cache starts empty and is never emptied.{bound}",
    )


def layer_table(simulation: Simulation, policy: str) -> Table[int]:
    """Decode hit rate and bytes of each layer under one policy, a column a size."""
    facts = simulation.trace
    cells = {size: simulation.cell(policy, size, "decode") for size in simulation.sizes}

    def column(size: int) -> list[Column[int]]:
        cell = cells[size]

        def rate(index: int) -> Cell | str:
            return _layer_rate(cell.counters.layers[index])

        def moved(index: int) -> Cell | str:
            if not cell.tokens:
                return NOT_MEASURED
            return si_bytes(cell.counters.layers[index].bytes_moved / cell.tokens)

        return [
            Column(f"hit rate at {size}", rate, "%", "higher"),
            Column(f"moved a token at {size}", moved, "", "lower"),
        ]

    return Table(
        f"By layer: {policy}, decode",
        (
            Column[int]("decoder layer", lambda i: str(facts.layers[i])),
            *(part for size in simulation.sizes for part in column(size)),
        ),
        range(len(facts.layers)),
        f"{_source(facts)}.",
    )


def gpu_table(
    rows: Sequence[GpuRow],
    geometry: Geometry,
    name: str,
    context: int,
    measured: Measured,
    trace: TraceFacts,
) -> Table[GpuRow]:
    """The requirements table of a model card, filled by arithmetic: what is not on a data sheet is derived.

    Args:
        rows: all with the same assumptions about routing, in the same order.
        geometry, name: of the model that is to run.
        measured: of the one GPU of the table, where anything was.
    """

    def routed(index: int) -> list[Column[GpuRow]]:
        routing = rows[0].predictions[index].routing
        return [
            Column(f"hit rate, {routing}", lambda r: _hit(r.predictions[index]), "%", "higher"),
            Column(f"tok/s at most, {routing}", lambda r: _speed(r.predictions[index]), "", "higher"),
        ]

    return Table(
        f"GPU requirements of {name}",
        (
            Column[GpuRow]("GPU", lambda r: r.gpu.name),
            Column[GpuRow]("memory", lambda r: f"{r.gpu.memory_bytes / 1e9:.1f}", "GB"),
            Column[GpuRow]("experts on the device", lambda r: _cache(r, geometry)),
            Column[GpuRow](
                "memory needed", lambda r: Cell(f"{r.any.device_bytes / 1e9:.1f}", "derived"), "GB"
            ),
            *(column for index in range(len(rows[0].predictions)) for column in routed(index)),
        ),
        rows,
        _gpu_caption(rows, geometry, context, measured, trace),
    )


def _gpu_caption(
    rows: Sequence[GpuRow], geometry: Geometry, context: int, measured: Measured, trace: TraceFacts
) -> str:
    compute, transfer = measured.compute_s, measured.transfer_bytes_per_s
    mine, theirs = trace.geometry.experts, geometry.experts
    parts = [
        f"Derived, not measured. One sequence of {context:,} tokens; time of a token =",
        "the bytes it reads over the data sheet's memory bandwidth,"
        if compute is None
        else f"{1e3 * compute:.3g} ms as measured,",
        f"plus missed experts of {si_bytes(geometry.expert_bytes)} over",
        "the peak of one direction of the host link."
        if transfer is None
        else f"{transfer / 1e9:.3g} GB/s as measured.",
        "Kernels, launches and waiting only lower it.",
        f"Memory: weights on the device, keys, values and states, and {si_bytes(RESERVE_BYTES)} for the",
        f"runtime (assumed). Uniform routing: N of {theirs} experts are hit N/{theirs} of the time.",
    ]
    if mine != theirs:
        parts.append(
            f"The trace is of {trace.model}, with {mine} experts in {len(trace.layers)} layers: N of "
            f"{theirs} are taken to be hit as often as the same share of its {mine}, which is an assumption."
        )
    if trace.dummy:
        parts.append(f"The trace is of {DUMMY}.")
    parts.append("Sources: " + "; ".join(dict.fromkeys(row.gpu.source for row in rows)) + ".")
    return " ".join(parts)


def _source(facts: TraceFacts) -> str:
    of = DUMMY if facts.dummy else facts.model
    return (
        f"trace of {of} on {facts.corpus} ({facts.engine}, {facts.computed}), "
        f"{facts.input_len} tokens in and {facts.output_len} out, {facts.concurrency} at once"
    )


def _size(row: PolicyRow, facts: TraceFacts) -> str:
    size = row.decode.counters.size
    return f"{size} of {facts.geometry.experts}" + " (all)" * (size == facts.geometry.experts)


def _rate(cell: SimulatedCell) -> Cell | str:
    rate = cell.counters.hit_rate
    return NOT_MEASURED if rate is None else f"{100 * rate:.1f}"


def _layer_rate(layer: LayerCounters) -> Cell | str:
    served = layer.hits + layer.misses
    return f"{100 * layer.hits / served:.1f}" if served else NOT_MEASURED


def _misses(cell: SimulatedCell) -> Cell | str:
    return f"{cell.counters.misses / cell.tokens:.2f}" if cell.tokens else NOT_MEASURED


def _moved(cell: SimulatedCell) -> Cell | str:
    return NOT_MEASURED if cell.bytes_per_token is None else si_bytes(cell.bytes_per_token)


def _overflow(cell: SimulatedCell) -> str:
    steps = sum(layer.steps for layer in cell.counters.layers)
    return f"{cell.counters.overflow_steps:,} of {steps:,}"


def _cache(row: GpuRow, geometry: Geometry) -> str:
    size = row.any.size
    shown = f"all {size}" if size == geometry.experts else f"{size} of {geometry.experts}"
    return shown + ", the most that fit" * (row.is_largest and size < geometry.experts)


def _hit(prediction: Prediction) -> Cell:
    return Cell(f"{100 * prediction.hit_rate:.1f}", "derived")


def _speed(prediction: Prediction) -> Cell:
    if not prediction.fits:
        return Cell("does not fit", "derived")
    speed = prediction.tokens_per_s
    return Cell(f"{speed:.1f}" if speed < 99.95 else f"{speed:,.0f}", "derived")
