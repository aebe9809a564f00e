"""Where numbers come from: machine, versions, commit and protocol of each run; and what came to nothing."""

from collections.abc import Sequence

from evalsuite.core.record import Record
from evalsuite.report.choose import device_of, model_of
from evalsuite.report.naming import what
from evalsuite.report.speed import ENDINGS
from evalsuite.report.tables import NOT_MEASURED, Cell, Column, Table
from evalsuite.report.varying import settle

SHOWN = ("torch", "vllm", "transformers", "compressed-tensors", "triton")


def runs_table(records: Sequence[Record]) -> Table[Record]:
    """Every run of the report: what, when, where, with which code."""
    labels, shared = settle(
        (
            Column[Record]("run", lambda r: r.run_id, label=True),
            Column[Record]("kind", lambda r: r.kind, label=True),
            Column[Record]("ended", lambda r: r.status, label=True),
            Column[Record]("started", lambda r: r.started.replace("+00:00", " UTC"), label=True),
            Column[Record]("on", device_of, label=True),
            Column[Record]("driver", lambda r: r.machine.gpu_driver or "—", label=True),
            Column[Record]("libraries", _libraries, prose=2, label=True),
            Column[Record]("commit", _commit, label=True),
            Column[Record]("protocol", lambda r: r.protocol.name if r.protocol else "—", label=True),
            Column[Record]("spec", lambda r: r.spec_hash, label=True),
        ),
        records,
    )
    return Table(
        "Runs", labels, records,
        "A commit with + had changes that were not committed; a dash: it ran from a copy without a "
        "history. A run's folder in the results has its name; "
        f"its record holds everything else. {shared}",
    )  # fmt: skip


def failures_table(records: Sequence[Record]) -> Table[Record]:
    """Runs that came to nothing, and why."""
    return Table(
        "Runs without a number",
        (
            Column[Record]("model", model_of, label=True),
            Column[Record]("measured", what, label=True),
            Column[Record]("ended", lambda r: Cell(ENDINGS[r.status], "failed", (r.run_id,))),
            Column[Record]("why", lambda r: _first(r.error) or NOT_MEASURED, prose=3),
        ),
        records,
        "A run that succeeded later under the same conditions takes the place of one that did not.",
    )


def warnings_table(records: Sequence[Record]) -> Table[tuple[str, tuple[str, ...]]]:
    """What records warn of, each warning once, with the runs that it is of."""
    found: dict[str, tuple[str, ...]] = {}
    for record in records:
        for warning in dict.fromkeys((*record.warnings, *(record.model.warnings if record.model else ()))):
            found[warning] = (*found.get(warning, ()), record.run_id)
    return Table(
        "What the runs warn of",
        (
            Column[tuple[str, tuple[str, ...]]]("warning", lambda w: w[0], prose=4),
            Column[tuple[str, tuple[str, ...]]]("runs", lambda w: Cell(str(len(w[1])), "measured", w[1])),
        ),
        list(found.items()),
    )


def _libraries(record: Record) -> str:
    packages = record.machine.packages
    return ", ".join(f"{name} {packages[name]}" for name in SHOWN if name in packages)


def _commit(record: Record) -> str:
    commit = record.machine.git_commit
    return "—" if commit is None else commit[:10] + ("+" if record.machine.git_dirty else "")


def _first(text: str | None) -> str:
    return (text or "").partition("\n")[0]
