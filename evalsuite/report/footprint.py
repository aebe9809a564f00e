"""The tables of a footprint run. GB is 10⁹ bytes in every column; what could not be read shows a dash."""

from collections.abc import Mapping, Sequence

from evalsuite.core.record import Record
from evalsuite.core.speed import FootprintResult
from evalsuite.core.telemetry import Telemetry
from evalsuite.core.units import duration
from evalsuite.report.choose import devices_of
from evalsuite.report.tables import NOT_MEASURED, Cell, Column, Table
from evalsuite.telemetry.phases import PhaseFootprint

PURPOSES = {
    "checkpoint": "weight files",
    "expert_files": "expert-cache files",
    "hub_cache": "hub cache, all models",
}
# the numbers that an engine reports, and the names under which it says why one is absent
ENGINE_NUMBERS = {
    "weights, as the engine reports": ("weights_bytes", "weights", "engine"),
    "KV budget, as the engine reports": ("kv_cache_bytes", "kv_cache", "engine"),
    "framework's peak allocated": ("allocated_peak_bytes", "allocator", "engine"),
}
Quantity = tuple[str, Cell | str, str]


def gigabytes(count: float | None) -> Cell | str:
    """GB with three digits, at most four decimals: a column stays narrow."""
    if count is None:
        return NOT_MEASURED
    value = count / 1e9
    if abs(value) >= 999.5:
        return f"{value:.0f}"  # three digits would be written with an exponent
    return f"{value:.3g}" if abs(value) >= 0.1 or value == 0 else f"{value:.4f}"


def phase_table(record: Record, phases: Sequence[PhaseFootprint]) -> Table[PhaseFootprint]:
    """Peaks of memory and amounts of disk traffic, a phase a row."""
    telemetry = record.telemetry
    assert telemetry is not None
    columns = [
        Column[PhaseFootprint]("phase", lambda p: p.name, label=True),
        Column[PhaseFootprint]("time", lambda p: f"{p.seconds:.1f}", "s"),
        Column[PhaseFootprint]("VRAM device", lambda p: gigabytes(p.gpu_used_peak_bytes), "GB", "lower"),
    ]
    if any(phase.gpu_process_peak_bytes is not None for phase in phases):
        columns.append(
            Column[PhaseFootprint]("VRAM tree", lambda p: gigabytes(p.gpu_process_peak_bytes), "GB", "lower")
        )
    columns += [
        Column[PhaseFootprint]("RSS", lambda p: gigabytes(p.rss_peak_bytes), "GB", "lower"),
        Column[PhaseFootprint]("PSS", lambda p: gigabytes(p.pss_peak_bytes), "GB", "lower"),
        Column[PhaseFootprint]("page cache", lambda p: gigabytes(p.page_cache_bytes), "GB"),
        Column[PhaseFootprint]("disk reads", lambda p: gigabytes(p.disk_read_bytes), "GB", "lower"),
        Column[PhaseFootprint]("disk writes", lambda p: gigabytes(p.disk_written_bytes), "GB", "lower"),
    ]
    if any(phase.gpu_energy_j is not None for phase in phases):
        columns.append(
            Column[PhaseFootprint](
                "GPU energy",
                lambda p: NOT_MEASURED if p.gpu_energy_j is None else f"{p.gpu_energy_j:,.0f}",
                "J",
                "lower",
            )
        )
    return Table(f"Footprint of {_name(record)}", columns, phases, " ".join(_caption(record, phases)))


def _name(record: Record) -> str:
    return record.model.name if record.model else str(record.spec["model"])


def computed_where(record: Record) -> str:
    """In what arithmetic and on what it ran, for a caption; of a run that failed, how it ended."""
    if record.model is None:
        return record.status
    count, name = devices_of(record), record.model.device_name
    return f"{record.model.computed} ({name if count == 1 else f'{count} × {name}, together'})"


def _devices(record: Record) -> str:
    count = devices_of(record)
    return "the whole device" if count == 1 else f"{count} whole devices together"


def _caption(record: Record, phases: Sequence[PhaseFootprint]) -> list[str]:
    telemetry, result = record.telemetry, record.results
    assert telemetry is not None
    lines: list[str] = []
    if record.model is not None:
        lines.append(f"{computed_where(record)}; {record.model.stored}.")
    if isinstance(result, FootprintResult):
        lines.append(f"One prompt round of {result.input_len} tokens in, {result.output_len} out.")
    lines.append(
        f"GB = 10⁹ bytes. VRAM: the phase's peak, of {_devices(record)} and of the engine's process tree. "
        "RSS and PSS: the tree's peak; RSS counts shared pages once for each process, PSS once. Page cache: "
        "what of the weight files and expert files is resident at the end of the phase. Load begins with "
        "the start of the engine's process."
    )
    lines += absences(telemetry)
    if any(p.pss_peak_bytes is None for p in phases) and "pss_bytes" not in telemetry.absent:
        lines.append("PSS and page cache are read about once a second: a shorter phase may have no reading.")
    return lines


def absences(telemetry: Telemetry) -> list[str]:
    """Why there are dashes, and which numbers are not to be trusted, a sentence a reason."""
    named: dict[str, list[str]] = {}
    for name, reason in telemetry.absent.items():
        named.setdefault(f"Absent: {{}} ({reason}).", []).append(name)
    for series in telemetry.series:
        if not series.valid:
            named.setdefault(f"Not valid: {{}} ({series.reason}).", []).append(series.name)
    return [sentence.format(_short(names)) for sentence, names in named.items()]


def _short(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def vram_numbers(record: Record) -> Mapping[str, int | str]:
    """The four numbers that are called VRAM, each in bytes or the reason why there is none."""
    telemetry = record.telemetry
    assert telemetry is not None
    engine = telemetry.engine
    numbers: dict[str, int | str] = {}
    if engine is None:
        numbers |= dict.fromkeys(ENGINE_NUMBERS, "the engine did not get so far")
    else:
        values = engine.weights_bytes, engine.kv_cache_bytes, engine.allocated_peak_bytes
        for (title, keys), value in zip(ENGINE_NUMBERS.items(), values, strict=True):
            why = (engine.absent[key] for key in keys if key in engine.absent)
            numbers[title] = next(why, "not reported") if value is None else value
    device = [
        int(s.maximum)
        for s in telemetry.series
        if s.name.startswith("gpu") and s.name.endswith("_used_bytes")
    ]
    if telemetry.gpu_process_peak_bytes is not None:
        numbers["NVML peak of the process tree"] = telemetry.gpu_process_peak_bytes
    elif device:
        numbers["NVML peak of the whole device"] = sum(device)
    else:
        numbers["NVML peak"] = gpu_absent(telemetry)
    return numbers


def gpu_absent(telemetry: Telemetry) -> str:
    """Why no GPU was read."""
    found = [reason for name, reason in telemetry.absent.items() if name.startswith("gpu")]
    return found[0] if found else "no GPU was watched"


def memory_table(record: Record) -> Table[Quantity]:
    """The four VRAM numbers beside the checkpoint's size, disk by purpose, and how loading went."""
    rows: list[Quantity] = []
    for title, value in vram_numbers(record).items():
        rows.append((title, gigabytes(value), "") if isinstance(value, int) else (title, NOT_MEASURED, value))
    result = record.results
    if isinstance(result, FootprintResult):
        rows.append(("checkpoint's weight files", gigabytes(result.checkpoint_bytes), _warmth(result)))
        for purpose, title in PURPOSES.items():
            rows.append(
                (
                    f"disk: {title}",
                    gigabytes(result.disk_bytes.get(purpose)),
                    result.disk_absent.get(purpose, ""),
                )
            )
    device = record.model.device if record.model else "unknown"
    device += f" and {devices_of(record) - 1} more" * (devices_of(record) > 1)
    return Table(
        f"Memory of {_name(record)} by who counts it",
        (
            Column[Quantity]("quantity", lambda r: r[0]),
            Column[Quantity]("size", lambda r: r[1], "GB"),
            Column[Quantity]("note", lambda r: r[2]),
        ),
        rows,
        f"GB = 10⁹ bytes. The engine's device is {device}. KV budget is what the engine reserves, not what "
        "this request needs. Disk: blocks allocated; a file with two names counts once.",
    )


def _warmth(result: FootprintResult) -> str:
    load = result.load
    parts = [] if load.total_s is None else [f"loaded in {duration(load.total_s)}"]
    if load.resident_share is not None:
        parts.append(f"{100 * load.resident_share:.0f} % in the page cache before")
    return ", ".join(parts)
