"""GPU requirements: memory and speed where they were measured, and what follows for GPUs that nobody had.

What is derived comes from the model's geometry (`evalsuite.core.geometry`) and the vendors' data sheets by
`evalsuite.experts.predict`; every such cell says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from evalsuite.core.geometry import Geometry
from evalsuite.core.record import Record
from evalsuite.core.speed import SpeedResult
from evalsuite.core.units import si_bytes
from evalsuite.experts.gpus import GPUS, GpuSheet
from evalsuite.experts.predict import (
    RESERVE_BYTES,
    Measured,
    Prediction,
    largest_cache,
    predict,
    uniform_routing,
)
from evalsuite.report.choose import device_of, devices_of
from evalsuite.report.perplexity import plus_minus
from evalsuite.report.speed import ENDINGS
from evalsuite.report.speed_cell import routing_words
from evalsuite.report.tables import NOT_MEASURED, Cell, Column, Table
from evalsuite.report.vram import device_peak, engine_numbers, serving_of, store_of

CONTEXT = 4096
SMALL_BYTES = RESERVE_BYTES  # a model below it runs on any GPU: no table says more


@dataclass(frozen=True)
class Need:
    """One way of running the model on one GPU: a measured run, or what is derived for a data sheet."""

    run: Record | None = None
    gpu: GpuSheet | None = None
    prediction: Prediction | None = None
    weights_bytes: int | None = None


def needs(geometry: Geometry, runs: Sequence[Record]) -> list[Need]:
    """Measured rows, then a derived one for each GPU and each way that fits it.

    Args:
        runs: finished speed and footprint runs of the model on GPUs.
    """
    rows = [Need(run=run, weights_bytes=engine_numbers(run).weights_bytes) for run in runs]
    for gpu in GPUS.values():
        sizes: list[int] = []
        if geometry.experts:
            largest = largest_cache(geometry, gpu.memory_bytes, CONTEXT)
            sizes = [] if largest is None else sorted({largest, geometry.experts}, reverse=True)
        for size in sizes:
            found = predict(geometry, gpu, size, uniform_routing(geometry.experts), CONTEXT, Measured())
            if found.fits or size == geometry.experts:
                rows.append(Need(None, gpu, found, geometry.device_bytes(size)))
    return rows


def requirements_table(name: str, geometry: Geometry, rows: Sequence[Need]) -> Table[Need]:
    """GPU, its memory, what the model takes of it, and the speed, a way of running a row."""
    experts = geometry.experts

    def cache(row: Need) -> str:
        if row.prediction:
            size = row.prediction.size
        else:
            size = serving_of(row.run).moe_expert_cache_size if row.run else None
        return "all" if size in (None, experts) else f"{size}"

    columns = [
        Column[Need]("GPU", _gpu, label=True),
        Column[Need]("memory", _memory, "GB"),
        Column[Need]("experts on the device", cache, label=True),
        *_told_apart(rows),
        Column[Need]("weights", _weights, "GB", "lower"),
        Column[Need]("needed", _needed, "GB", "lower"),
        Column[Need]("reserved by the engine", _peak, "GB"),
        Column[Need]("fits", _fits),
        Column[Need]("decode", _decode, "tok/s", "higher"),
    ]
    return Table(
        f"GPU requirements of {name}",
        [column for column in columns if column.label or any(column.get(r) != NOT_MEASURED for r in rows)],
        rows,
        f"Rows without a mark were measured. Derived: weights by the geometry, {CONTEXT:,} tokens of one "
        f"sequence, and {si_bytes(RESERVE_BYTES)} for the driver and workspaces, which is an assumption; "
        f"caches of the {experts} experts a layer as large as fits, their hits as if routing were uniform; "
        "decode is the most that the data sheet's bandwidths allow, which nobody reaches. Reserved: NVML's "
        "peak, the KV cache that the engine takes in advance included. GB = 10⁹ bytes.",
        lambda row: (row.run.run_id,) if row.run else (),
    )


def _told_apart(rows: Sequence[Need]) -> list[Column[Need]]:
    """Where the other experts are and who chooses them, where measured rows differ in it."""

    def routing(row: Need) -> str:
        return routing_words(serving_of(row.run).moe_routing) if row.run else "—"

    columns = (
        Column[Need]("store", lambda row: store_of(row.run) if row.run else "—", label=True),
        Column[Need]("routing", routing, label=True),
    )
    return [column for column in columns if len({column.get(row) for row in rows} - {"—"}) > 1]


def _gpu(row: Need) -> str:
    if row.run is None:
        return row.gpu.name if row.gpu else ""
    serving, device = serving_of(row.run), device_of(row.run)
    several = f"{serving.tensor_parallel_size} × " if serving.tensor_parallel_size > 1 else ""
    asked = "eager" if serving.enforce_eager else "graphs"
    return f"{several}{device}, {row.run.engaged.get('mode', asked)}"


def _memory(row: Need) -> Cell:
    if row.gpu:
        return Cell(f"{row.gpu.memory_bytes / 1e9:.1f}", "claimed")
    if row.run is None or not row.run.machine.gpus:
        return NOT_MEASURED
    return Cell(f"{devices_of(row.run) * row.run.machine.gpus[0].memory_bytes / 1e9:.1f}")


def _weights(row: Need) -> Cell:
    if row.weights_bytes is None:
        return NOT_MEASURED
    return Cell(f"{row.weights_bytes / 1e9:.1f}", "measured" if row.run else "derived")


def _needed(row: Need) -> Cell:
    return Cell(f"{row.prediction.device_bytes / 1e9:.1f}", "derived") if row.prediction else NOT_MEASURED


def _peak(row: Need) -> Cell:
    peak = device_peak(row.run) if row.run else None
    return NOT_MEASURED if peak is None else Cell(f"{peak / 1e9:.1f}")


def _fits(row: Need) -> Cell:
    if row.run:
        ended = row.run.status
        return Cell("yes") if ended == "ok" else Cell(ENDINGS[ended], "failed")
    return Cell("yes" if row.prediction and row.prediction.fits else "no", "derived")


def _decode(row: Need) -> Cell:
    if row.prediction:
        return (
            Cell(f"≤ {row.prediction.tokens_per_s:,.0f}", "derived") if row.prediction.fits else NOT_MEASURED
        )
    result = row.run.results if row.run else None
    if not isinstance(result, SpeedResult):
        return NOT_MEASURED
    speed = result.decode_tokens_per_s
    return Cell(plus_minus(speed.mean, speed.low, speed.high))
