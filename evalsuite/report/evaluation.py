"""The tables of an evaluation: what it will take, and what became of its steps."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from evalsuite.core.units import duration, si_bytes
from evalsuite.report.tables import NOT_MEASURED, Cell, Column, Table

Origin = Literal["here", "hub", "geometry", "made", "unknown"]
WHERE: dict[Origin, str] = {
    "here": "on this disk",
    "hub": "to download, as the hub lists it",
    "geometry": "to download, derived from its configuration",
    "made": "made by the first step",
    "unknown": "unknown: neither the hub nor a configuration is here",
}


@dataclass(frozen=True)
class PlannedModel:
    """A model of an evaluation.

    Attributes:
        weights_bytes: of its files, or None where nobody here knows.
        free_bytes: of the disk that they come to lie on.
        before_bytes: what models before this one bring to the same disk.
    """

    role: str
    name: str
    origin: Origin
    weights_bytes: int | None
    free_bytes: int
    before_bytes: int = 0

    @property
    def fits_disk(self) -> bool | None:
        if self.origin == "here":
            return True
        return (
            None if self.weights_bytes is None else self.before_bytes + self.weights_bytes < self.free_bytes
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"fits_disk": self.fits_disk}


@dataclass(frozen=True)
class PlannedCell:
    """One measurement of a step.

    Attributes:
        weights_bytes, request_bytes, device_bytes: as in `evalsuite.core.forecast.Forecast`.
        seconds: least time of its forward passes at the bandwidth or matrix rate of this machine.
        done: whether its record is in the store.
        refused: why this machine cannot run it; empty where it can, as far as is known.
        unknown: why there is no prediction.
    """

    step: str
    what: str
    engine: str | None = None
    weights_bytes: int | None = None
    request_bytes: int | None = None
    device_bytes: int | None = None
    disk_bytes: int | None = None
    seconds: float | None = None
    done: bool = False
    refused: str = ""
    unknown: str = ""

    @property
    def fits(self) -> bool | None:
        if self.weights_bytes is None or self.device_bytes is None:
            return None
        return self.weights_bytes + (self.request_bytes or 0) < self.device_bytes

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"fits": self.fits}


@dataclass(frozen=True)
class StepOutcome:
    """What became of a step.

    Attributes:
        status: ``ok``; ``failed`` with `why`; ``refused``, which is failed before anything loaded.
        seconds: that this command took for it.
    """

    step: str
    command: str
    status: Literal["ok", "failed", "refused"]
    seconds: float
    why: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def models_table(question: str, models: Sequence[PlannedModel]) -> Table[PlannedModel]:
    """The models, and what has to be downloaded or written for them."""
    return Table(
        question,
        (
            Column[PlannedModel]("role", lambda m: m.role),
            Column[PlannedModel]("model", lambda m: m.name, label=True),
            Column[PlannedModel]("weights", _weights),
            Column[PlannedModel]("where", lambda m: WHERE[m.origin], label=True),
            Column[PlannedModel]("disk has free", lambda m: si_bytes(m.free_bytes)),
            Column[PlannedModel]("fits the disk", lambda m: _yes_no(m.fits_disk)),
        ),
        models,
    )


def plan_table(cells: Sequence[PlannedCell], device: str) -> Table[PlannedCell]:
    """Every measurement of an evaluation, none of them run."""
    there = sum(cell.done for cell in cells)
    missing = [cell for cell in cells if not cell.done and not cell.refused]
    total = sum(cell.seconds or 0 for cell in missing)
    untimed = sum(cell.seconds is None for cell in missing)
    unknown = dict.fromkeys(_sentence(cell.unknown) for cell in cells if cell.unknown)
    engines = {cell.engine for cell in cells} - {None}
    devices = {cell.device_bytes for cell in cells} - {None}
    columns = [
        Column[PlannedCell]("what", lambda c: f"{c.step}: {c.what}", prose=1),
        Column[PlannedCell]("result", _result),
        Column[PlannedCell]("engine", lambda c: c.engine or NOT_MEASURED),
        Column[PlannedCell]("needs", _needs),
        Column[PlannedCell]("of", lambda c: _bytes(c.device_bytes)),
        Column[PlannedCell]("fits", lambda c: _yes_no(c.fits)),
        Column[PlannedCell]("writes", lambda c: _bytes(c.disk_bytes)),
        Column[PlannedCell]("at least", _time),
    ]
    constant = {"engine": len(engines) < 2, "of": len(devices) < 2}
    shown = [c for c in columns if not constant.get(c.title)]
    shared = [f"engine {engine}" for engine in engines if len(engines) == 1]
    shared += [f"{si_bytes(count)} on the device" for count in devices if len(devices) == 1 and count]
    return Table(
        f"{len(cells)} measurements, {there} of them there",
        [column for column in shown if any(column.get(cell) != NOT_MEASURED for cell in cells)],
        cells,
        (f"All: {', '.join(shared)}. " if shared else "")
        + "Nothing was loaded. Needs: weights and requests on each device, derived from configurations, for "
        f"{device}; vLLM reserves more, all of its share of a GPU. Times are those of the forward passes "
        "alone at this machine's measured copy bandwidth or matrix rate, so loading, compiling and all "
        "that falls short of a bound come on top"
        + (f": what is missing takes more than {duration(total)}. " if missing else ". ")
        + (f"For {untimed} of it no time is known. " if untimed else "")
        + " ".join(unknown),
    )


def refusal_table(cells: Sequence[PlannedCell]) -> Table[tuple[str, str]] | None:
    """What this machine cannot run, and why; None where there is nothing."""
    rows = list(dict.fromkeys((cell.step, cell.refused) for cell in cells if cell.refused))
    if not rows:
        return None
    return Table(
        "Not on this machine",
        (
            Column[tuple[str, str]]("step", lambda r: r[0]),
            Column[tuple[str, str]]("why", lambda r: " ".join(r[1].split()), prose=1),
        ),
        rows,
    )


def outcome_table(question: str, outcomes: Sequence[StepOutcome]) -> Table[StepOutcome]:
    """What became of every step."""
    columns = [
        Column[StepOutcome]("step", lambda o: o.step),
        Column[StepOutcome]("status", lambda o: o.status),
        Column[StepOutcome]("time", lambda o: duration(o.seconds)),
    ]
    if any(outcome.why for outcome in outcomes):
        columns.append(Column[StepOutcome]("why", lambda o: " ".join(o.why.split()), prose=1))
    return Table(
        question,
        columns,
        outcomes,
        "Time of this command alone: what it found in the store took none.",
    )


def _weights(model: PlannedModel) -> Cell:
    if model.weights_bytes is None:
        return NOT_MEASURED
    origin = "derived" if model.origin in ("geometry", "made") else "measured"
    return Cell(si_bytes(model.weights_bytes), origin)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:].rstrip(".") + "."


def _result(cell: PlannedCell) -> str:
    return "there" if cell.done else "not possible" if cell.refused else "missing"


def _time(cell: PlannedCell) -> Cell | str:
    if cell.done:
        return "—"
    if cell.seconds is None:
        return "unknown"
    return "< 0.1 s" if cell.seconds < 0.1 else duration(cell.seconds)


def _needs(cell: PlannedCell) -> Cell:
    return _bytes(None if cell.weights_bytes is None else cell.weights_bytes + (cell.request_bytes or 0))


def _bytes(count: int | None) -> Cell:
    return NOT_MEASURED if count is None else Cell(si_bytes(count))


def _yes_no(value: bool | None) -> str:
    return "unknown" if value is None else "yes" if value else "no"
