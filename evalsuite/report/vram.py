"""Memory of many runs side by side: the four numbers that are called VRAM, each by who counts it."""

from collections.abc import Sequence

from evalsuite.core.record import Record
from evalsuite.core.spec import Serving
from evalsuite.core.telemetry import EngineMemory
from evalsuite.report.apart import checkpoint_names
from evalsuite.report.choose import device_of
from evalsuite.report.footprint import gigabytes
from evalsuite.report.speed_cell import routing_words
from evalsuite.report.tables import NOT_MEASURED, Cell, Column, Table
from evalsuite.report.varying import settle


def serving_of(record: Record) -> Serving:
    return Serving.model_validate(record.spec["serving"])


def engine_numbers(record: Record) -> EngineMemory:
    """What the engine said of its memory; nothing where it did not get so far."""
    engine = record.telemetry.engine if record.telemetry else None
    return engine or EngineMemory()


def device_peak(record: Record) -> float | None:
    """NVML's peak of the process tree; of the whole devices where the tree could not be told apart."""
    telemetry = record.telemetry
    if telemetry is None:
        return None
    if telemetry.gpu_process_peak_bytes is not None:
        return telemetry.gpu_process_peak_bytes
    used = [
        s.maximum for s in telemetry.series if s.name.startswith("gpu") and s.name.endswith("_used_bytes")
    ]
    return sum(used) if used else None


def _slots(record: Record) -> str:
    size = serving_of(record).moe_expert_cache_size
    return "all" if size is None else str(size)


def store_of(record: Record) -> str:
    """Where the experts are that are not on the device; a dash where all are."""
    serving = serving_of(record)
    return "—" if serving.moe_expert_cache_size is None else serving.moe_expert_store


LABELS = (
    Column[Record]("measured by", lambda r: r.kind, label=True),
    Column[Record]("cache", _slots, label=True),
    Column[Record]("store", store_of, label=True),
    Column[Record]("routing", lambda r: routing_words(serving_of(r).moe_routing), label=True),
    Column[Record]("mode", lambda r: str(r.engaged.get("mode", "")), label=True),
    Column[Record]("concurrency", lambda r: str(r.spec["workload"]["concurrency"]), label=True),
    Column[Record]("tensor parallel", lambda r: str(serving_of(r).tensor_parallel_size), label=True),
    Column[Record]("GPUs beside", lambda r: str(r.beside or "—"), label=True),
    Column[Record]("on", device_of, label=True),
)


def vram_table(records: Sequence[Record]) -> Table[Record]:
    """Weights, KV budget, allocator's peak and NVML's peak beside the checkpoint's size, a run a row.

    Args:
        records: speed and footprint runs.
    """
    names = checkpoint_names(records)
    model = Column[Record]("model", lambda r: names[r.run_id], label=True)
    labels, shared = settle((model, *LABELS), records)
    columns = [
        Column[Record]("checkpoint on disk", _disk, "GB", "lower"),
        Column[Record]("weights", lambda r: gigabytes(engine_numbers(r).weights_bytes), "GB", "lower"),
        Column[Record]("KV budget", lambda r: gigabytes(engine_numbers(r).kv_cache_bytes), "GB"),
        Column[Record](
            "allocator's peak", lambda r: gigabytes(engine_numbers(r).allocated_peak_bytes), "GB", "lower"
        ),
        Column[Record]("NVML's peak", lambda r: gigabytes(device_peak(r)), "GB", "lower"),
        Column[Record]("RAM peak", _ram, "GB", "lower"),
    ]
    shown = [column for column in columns if any(column.get(r) != NOT_MEASURED for r in records)]
    return Table(
        "Memory by who counts it",
        [*labels, *shown],
        records,
        f"Weights and KV budget as the engine reports them, on all its devices together; allocator: of the "
        "framework; NVML: of the process tree. A KV budget is what the engine reserves, so that NVML's peak "
        "follows the flag that limits it and not the model. RAM: resident set of the process tree. GB = 10⁹ "
        f"bytes. {shared}",
        lambda r: (r.run_id,),
    )


def _disk(record: Record) -> Cell | str:
    stored = record.model.stored_bytes if record.model else 0
    return gigabytes(stored) if stored else NOT_MEASURED


def _ram(record: Record) -> Cell | str:
    return gigabytes(record.telemetry.rss_peak_bytes if record.telemetry else None)
