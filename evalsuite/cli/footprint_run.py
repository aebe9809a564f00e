"""What `footprint` does once its flags are a spec: the run, its tables and its pictures."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from evalsuite.cli.show import Screen
from evalsuite.core.record import Record
from evalsuite.core.spec import FootprintSpec
from evalsuite.core.speed import FootprintResult
from evalsuite.data.corpora import load_corpus
from evalsuite.data.models import find_checkpoint
from evalsuite.report.footprint import absences, computed_where, memory_table, phase_table, vram_numbers
from evalsuite.report.footprint_plots import over_time, vram_bars
from evalsuite.report.naming import what
from evalsuite.run.footprint import Footprint, run_footprint
from evalsuite.run.resume import finished_cell
from evalsuite.run.subject import check_cache_sizes, prepare
from evalsuite.store.runs import RunStore
from evalsuite.telemetry.machine import read_machine
from evalsuite.telemetry.phases import PhaseFootprint, by_phase
from evalsuite.telemetry.samples import load_samples

HOW_TO_RUN_ANOTHER = "This is the built-in model. For a model of your own: hlwq-eval footprint MODEL"


def watch_model(screen: Screen, spec: FootprintSpec, results: Path, *, again: bool = True) -> None:
    """Run and show.

    Args:
        again: also where a finished run of this spec is there, on such a machine; else that one is shown.

    Raises:
        EvalError: the engine's own, after what it took until then has been shown.
    """
    find_checkpoint(spec.model, weights=spec.serving.load_format != "dummy")  # before a text is downloaded
    subject = prepare(spec.model, spec.serving, spec.workload, load_corpus(spec.workload.corpus))
    for note in check_cache_sizes(subject.checkpoint, [spec.serving.moe_expert_cache_size]):
        screen.warn(note)
    store = RunStore(results)
    found = None if again else finished_cell(store, spec, subject, read_machine())
    if found is not None:
        screen.note(f"{subject.checkpoint.name} was watched before")
        finished = Footprint(found.path, found.record, None)
    else:
        finished = run_footprint(spec, subject, store, lambda name: screen.note(f"{name} …"))
    record = finished.record
    for warning in record.warnings:
        screen.warn(warning)
    phases = show(screen, finished.path, record)
    if spec.model == "demo":
        screen.note(HOW_TO_RUN_ANOTHER)
    document: dict[str, Any] = {"path": str(finished.path), **record.model_dump(mode="json")}
    screen.document(document | {"phases": [phase.as_dict() for phase in phases]})
    if finished.error is not None:
        raise finished.error


def show(screen: Screen, folder: Path, record: Record) -> list[PhaseFootprint]:
    """Tables and pictures of a finished run, from its files alone; the phases that they show."""
    assert record.telemetry is not None
    samples = load_samples(folder)
    phases = by_phase(samples, record.telemetry.phases)
    table = phase_table(record, phases)
    screen.table(replace(table, title=f"{table.title}: {what(record).removeprefix('footprint, ')}"))
    screen.table(memory_table(record))
    screen.note(f"record: {folder}")
    result = record.results if isinstance(record.results, FootprintResult) else None
    name = record.model.name if record.model else str(record.spec["model"])
    where = computed_where(record)
    pictures = [
        over_time(
            samples, record.telemetry, f"{name}: memory and disk over time\n{what(record)}",
            " ".join((f"{where}. GB = 10⁹ bytes.", *absences(record.telemetry))), folder / "footprint",
        ),
        vram_bars(
            vram_numbers(record), result.checkpoint_bytes or None if result else None,
            f"{name}: four numbers that are called VRAM\n{what(record)}", f"{where}.", folder / "vram",
        ),
    ]  # fmt: skip
    for paths in pictures:
        screen.note(f"picture: {paths[0]} (and {paths[1].suffix[1:]})")
    return phases
