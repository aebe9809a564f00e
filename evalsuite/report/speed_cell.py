"""A cell of a sweep as a row of tables and pictures, and the settings that tell rows apart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from evalsuite.core.record import Record
from evalsuite.core.spec import SpeedSpec
from evalsuite.core.speed import SpeedResult
from evalsuite.report.apart import checkpoint_names
from evalsuite.report.choose import device_of, environment_of, model_of
from evalsuite.report.tables import Column

UNKNOWN = "—"  # of a cell that failed early, or that was on no GPU


@dataclass(frozen=True)
class Row:
    """One finished cell, or one that came to nothing, which has no `result`.

    Attributes:
        verdict: what binds it.
        agreement: share of tokens before the first difference from the uncached arm of the same model; None
            where there is no such arm, and for that arm itself, which `is_reference`.
    """

    record: Record
    verdict: str = ""
    agreement: float | None = None
    is_reference: bool = False

    @property
    def spec(self) -> SpeedSpec:
        return SpeedSpec.model_validate(self.record.spec)

    @property
    def result(self) -> SpeedResult:
        assert isinstance(self.record.results, SpeedResult)
        return self.record.results

    @property
    def failed(self) -> bool:
        return self.record.status != "ok"

    @property
    def model(self) -> str:
        return model_of(self.record)

    @property
    def mode(self) -> str:
        asked = "eager" if self.spec.serving.enforce_eager else "graphs"
        return str(self.record.engaged.get("mode", asked))

    @property
    def cached(self) -> bool:
        return self.spec.serving.moe_expert_cache_size is not None

    @property
    def routing(self) -> str:
        return routing_words(self.spec.serving.moe_routing)

    @property
    def device(self) -> str:
        return device_of(self.record)

    @property
    def place(self) -> str:
        """The device, and how many of them."""
        ranks = self.spec.serving.tensor_parallel_size
        return self.device + f", tensor parallel {ranks}" * (ranks > 1)


@dataclass(frozen=True)
class Setting:
    """What a cell was asked for: a column where it varies, a part of the caption where it does not."""

    title: str
    get: Callable[[Row], str]
    sentence: Callable[[str], str] | None


def _cache_sentence(size: str) -> str:
    return "no expert cache" if size == "all" else f"a cache of {size} experts a layer"


def routing_words(routing: str) -> str:
    """Who chooses the experts, as a column has it."""
    law, _, exponent = routing.partition(":")
    return {"model": "by the model", "uniform_random": "uniform random"}.get(law, f"Zipf {exponent}")


def _routing_sentence(routing: str) -> str:
    if routing == "by the model":
        return ""
    exponent = routing.partition("Zipf ")[2]
    law = f"by Zipf's law with exponent {exponent}" if exponent else "uniformly at random"
    return f"experts drawn {law}"


NONE = "none"
ENVIRONMENT = Setting(
    "environment",
    lambda r: environment_of(r.record) or NONE,
    lambda told: "" if told == NONE else f"with {told}",
)
SETTINGS = (
    Setting("cache", lambda r: slots(r.spec), _cache_sentence),
    Setting("mode", lambda r: r.mode, lambda mode: "mode unknown" if mode == "unknown" else mode),
    Setting(
        "policy",
        lambda r: r.spec.serving.moe_expert_cache_policy if r.cached else UNKNOWN,
        "policy {}".format,
    ),
    Setting("store", lambda r: r.spec.serving.moe_expert_store if r.cached else UNKNOWN, "store {}".format),
    Setting("routing", lambda r: r.routing, _routing_sentence),
    Setting("on", lambda r: r.device, "on {}".format),
    Setting("GPU", lambda r: "+".join(map(str, r.spec.serving.gpus)) or UNKNOWN, None),
    Setting(
        "tensor parallel",
        lambda r: str(r.spec.serving.tensor_parallel_size),
        lambda ranks: "" if ranks == "1" else f"tensor parallel {ranks}",
    ),
    Setting("concurrency", lambda r: str(r.spec.workload.concurrency), "concurrency {}".format),
    Setting("engine", lambda r: str(r.record.engaged.get("engine", "unknown")), "engine {}".format),
    Setting("dtype", lambda r: r.record.model.dtype if r.record.model else UNKNOWN, "{}".format),
    Setting("prompt", lambda r: f"{r.spec.workload.input_len:,}", "{} prompt tokens".format),
    Setting("output", lambda r: f"{r.spec.workload.output_len:,}", "{} output tokens".format),
    ENVIRONMENT,
    Setting(
        "GPUs beside",
        lambda r: str(r.record.beside or NONE),
        lambda count: "" if count == NONE else f"other GPUs measured at the same time: {count}",
    ),
    Setting("repeats", lambda r: str(r.spec.workload.repeats), "{} repeats".format),
)
ONLY_TO_TELL_APART = ("GPU", "repeats")  # columns where rows would otherwise read the same


def speed_order(row: Row) -> tuple[Any, ...]:
    """Sorts cells by model, device, mode and concurrency, and by cache size, every expert last."""
    serving, concurrency = row.spec.serving, row.spec.workload.concurrency
    size, how = serving.moe_expert_cache_size, (serving.moe_expert_store, serving.moe_expert_cache_policy)
    return (
        row.model, row.device, serving.tensor_parallel_size, row.mode, serving.moe_routing, concurrency,
        size is None, how, size or 0, row.record.beside, serving.gpus,
    )  # fmt: skip


def slots(spec: SpeedSpec) -> str:
    size = spec.serving.moe_expert_cache_size
    return "all" if size is None else str(size)


def settings_for(rows: Sequence[Row]) -> tuple[Setting, ...]:
    """All of them, models of one name told apart."""
    names = checkpoint_names([row.record for row in rows])
    return Setting("model", lambda r: names[r.record.run_id], "{}".format), *SETTINGS


def settings_of(rows: Sequence[Row]) -> tuple[list[Column[Row]], str]:
    """Columns for settings that vary, the model where none does; and a sentence on those that do not."""
    settings = settings_for(rows)
    values = {setting.title: {setting.get(row) for row in rows} - {UNKNOWN} for setting in settings}
    varying = [s for s in settings if len(values[s.title]) > 1]
    for title in ONLY_TO_TELL_APART:
        others = [s for s in varying if s.title != title]
        if len({tuple(s.get(row) for s in others) for row in rows}) == len(rows):
            varying = others
    columns = [Column[Row](s.title, s.get, label=True) for s in varying if s != ENVIRONMENT]
    legend = ""
    if ENVIRONMENT in varying:  # too long for a column
        told = sorted(values[ENVIRONMENT.title] - {NONE})
        letters = {variables: f"E{number}" for number, variables in enumerate(told, 1)}
        columns.append(Column("environment", lambda r: letters.get(ENVIRONMENT.get(r), NONE), label=True))
        legend = " Environment: what libraries were told that counts with as many GPUs; " + ", ".join(
            f"{letter}: {variables}" for variables, letter in letters.items()
        )
        legend += "."
    columns = columns or [Column[Row]("model", lambda r: r.model, label=True)]
    shared = [
        s.sentence(" or ".join(sorted(values[s.title])))
        for s in settings
        if s.sentence and values[s.title] and s not in varying
    ]
    said = ", ".join(sentence for sentence in shared if sentence)
    if "model" in {s.title for s in varying}:  # else it comes first, and keeps its name
        said = said[:1].upper() + said[1:]
    return columns, (f"{said}." if said else "") + legend


def mode_pairs(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Cells in eager mode, each with its sibling that differs in having CUDA graphs alone."""

    def key(row: Row) -> str:
        serving = row.spec.serving.model_copy(update={"enforce_eager": False})
        return (
            row.device
            + environment_of(row.record)
            + row.spec.model_copy(update={"serving": serving}).model_dump_json()
        )

    graphs: dict[str, list[Row]] = {}
    for row in rows:
        if not row.spec.serving.enforce_eager:
            graphs.setdefault(key(row), []).append(row)
    return [
        (row, min(graphs[key(row)], key=lambda other: abs(other.record.beside - row.record.beside)))
        for row in rows
        if row.spec.serving.enforce_eager and key(row) in graphs
    ]
