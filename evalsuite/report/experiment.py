"""The tables of an experiment: every arm against the baseline, and every arm through two engines."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from evalsuite.core.protocol import WindowProtocol
from evalsuite.core.record import CompareResult, PerplexityResult, QuantizeResult, Record
from evalsuite.core.units import si_bytes
from evalsuite.report.perplexity import p_text, plus_minus, with_interval
from evalsuite.report.quantization import recipe_text
from evalsuite.report.tables import NOT_MEASURED, Cell, Column, Table


@dataclass(frozen=True)
class ArmResult:
    """A row of the table.

    Attributes:
        engine: as the file names it.
        bits_per_weight: of the codes, also where the weights were scored as decoded.
        compared, quantized: None for the baseline.
        failed: why there is no result; all others are None then.
    """

    name: str
    engine: str
    bits_per_weight: float | None = None
    perplexity: PerplexityResult | None = None
    compared: CompareResult | None = None
    quantized: QuantizeResult | None = None
    failed: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "engine": self.engine,
            "bits_per_weight": self.bits_per_weight,
            "perplexity": self.perplexity and self.perplexity.model_dump(mode="json"),
            "compared": self.compared and self.compared.model_dump(mode="json"),
            "quantized": self.quantized and self.quantized.model_dump(mode="json"),
            "failed": self.failed or None,
        }


@dataclass(frozen=True)
class EnginePair:
    """One arm through two engines.

    Attributes:
        first, second: None where that engine failed.
        compared: the second against the first; None where there is nothing to compare, and `failed` says why.
    """

    name: str
    first: PerplexityResult | None
    second: PerplexityResult | None
    compared: CompareResult | None
    failed: str = ""

    def as_dict(self) -> dict[str, Any]:
        compared = self.compared and self.compared.model_dump(mode="json")
        return {"name": self.name, "compared": compared, "failed": self.failed or None}


@dataclass(frozen=True)
class PlannedArm:
    """What one arm will take.

    Attributes:
        recipe: plain values; empty for the baseline.
        bytes_to_write: of its checkpoint; 0 for a baseline that is used as it lies.
        done: whether its results are in the store already.
    """

    name: str
    recipe: Mapping[str, Any]
    bits_per_weight: float
    bytes_to_write: int
    done: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan_table(
    question: str,
    arms: Sequence[PlannedArm],
    windows: Sequence[tuple[WindowProtocol, int]],
    engines: Sequence[str],
) -> Table[PlannedArm]:
    """What an experiment would do."""
    counts = " and ".join(f"{count:,} windows ({protocol.describe()})" for protocol, count in windows)
    through = f", through {' and '.join(engines)} each" if len(engines) > 1 else ""
    total = sum(arm.bytes_to_write for arm in arms if not arm.done)
    return Table(
        question,
        (
            Column[PlannedArm]("arm", lambda a: a.name),
            Column[PlannedArm]("recipe", lambda a: recipe_text(a.recipe) if a.recipe else "as it is"),
            Column[PlannedArm]("bits per weight", lambda a: f"{a.bits_per_weight:.3f}"),
            Column[PlannedArm]("to write", lambda a: si_bytes(a.bytes_to_write)),
            Column[PlannedArm]("results", lambda a: "there" if a.done else "missing"),
        ),
        arms,
        f"Each arm scores {counts}{through}. What is missing writes {si_bytes(total)} in all; "
        "one arm's checkpoint at a time is on the disk, unless the file says keep.",
    )


def experiment_table(title: str, rows: Sequence[ArmResult], scored: Sequence[Record]) -> Table[ArmResult]:
    """Perplexity, its paired difference, divergence and agreement of each arm, under one protocol.

    Args:
        rows: each engine's baseline before its arms.
        scored: the runs of the rows, a baseline first; the caption says what they ran on.
    """
    model = scored[0].model
    assert model is not None
    columns = [
        Column[ArmResult]("arm", lambda a: a.name, label=True),
        Column[ArmResult]("engine", lambda a: a.engine, label=True),
        Column[ArmResult]("bits", _bits, better="lower"),
        Column[ArmResult]("error", _error, "%", "lower"),
        Column[ArmResult]("PPL", _perplexity, better="lower"),
        Column[ArmResult]("Δ ln PPL", lambda a: _delta(a.compared), better="lower"),
        Column[ArmResult]("p", lambda a: _p_value(a.compared)),
        Column[ArmResult]("KL", lambda a: _divergence(a.compared)[0], "nats", "lower"),
        Column[ArmResult]("top-1", lambda a: _divergence(a.compared)[1], "%", "higher"),
    ]
    several = len({row.engine for row in rows}) > 1
    if not several:
        del columns[1]
    return Table(
        title,
        columns,
        rows,
        f"{model.name} on {_conditions(scored)}. Bits: stored per "
        "quantized weight with scales, norms and shapes; decoded arms count the codes that they were decoded "
        "from. Error: ‖W − Ŵ‖ / ‖W‖ over the quantized weights. ± is half the 95 % interval over windows, "
        f"which is mostly the text's own variation; Δ ln PPL with its 95 % interval and p-value, mean KL "
        f"divergence and the share of tokens with the same most likely token are against {rows[0].name}"
        f"{' through the same engine' if several else ''}, paired by window.",
    )


def engines_table(
    title: str, engines: Sequence[str], pairs: Sequence[EnginePair], scored: Sequence[Record]
) -> Table[EnginePair]:
    """The same weights through two engines: both perplexities, and what lies between them.

    Args:
        engines: the first and the second.
        scored: as for `experiment_table`.
    """
    model = scored[0].model
    assert model is not None
    first, second = engines
    return Table(
        f"{title}: {second} against {first}",
        [
            Column[EnginePair]("arm", lambda p: p.name, label=True),
            Column[EnginePair](f"PPL, {first}", lambda p: _four_digits(p.first), better="lower"),
            Column[EnginePair](f"PPL, {second}", lambda p: _four_digits(p.second), better="lower"),
            Column[EnginePair]("Δ ln PPL", lambda p: _delta(p.compared)),
            Column[EnginePair]("p", lambda p: _p_value(p.compared)),
            Column[EnginePair]("KL", lambda p: _divergence(p.compared)[0], "nats", "lower"),
            Column[EnginePair]("top-1", lambda p: _divergence(p.compared)[1], "%", "higher"),
        ],
        pairs,
        f"{model.name} on {_conditions(scored)}. Both engines read the same checkpoint. Δ ln PPL is "
        f"{second} − {first} with its 95 % interval and p-value, KL the mean divergence of {second} from "
        f"{first}, top-1 the share of tokens with the same most likely token, paired by window.",
    )


def _conditions(scored: Sequence[Record]) -> str:
    first = scored[0]
    text, protocol, result = first.text, first.protocol, first.results
    assert text is not None
    assert protocol is not None
    assert isinstance(result, PerplexityResult)
    devices = dict.fromkeys(
        f"{record.model.computed} ({record.model.device_name})" for record in scored if record.model
    )
    return (
        f"{text.corpus}, {protocol.describe()}; {result.windows:,} windows, {result.scored_tokens:,} scored "
        f"tokens; {' and '.join(devices)}"
    )


def failures_table(failed: Sequence[tuple[str, str]]) -> Table[tuple[str, str]]:
    """What has no result, and why."""
    return Table(
        "Without a result",
        [
            Column[tuple[str, str]]("what", lambda row: row[0], prose=2, label=True),
            Column[tuple[str, str]]("why", lambda row: row[1], prose=5),
        ],
        failed,
    )


def _bits(arm: ArmResult) -> Cell | str:
    return NOT_MEASURED if arm.bits_per_weight is None else f"{arm.bits_per_weight:.3f}"


def _perplexity(arm: ArmResult) -> Cell | str:
    found = arm.perplexity
    return Cell("failed", "failed") if found is None else plus_minus(found.perplexity, found.low, found.high)


def _four_digits(result: PerplexityResult | None) -> Cell | str:
    """The engines agree far below the interval over windows."""
    return Cell("failed", "failed") if result is None else f"{result.perplexity:.4f}"


def _error(arm: ArmResult) -> Cell | str:
    error = arm.quantized.total.relative_error if arm.quantized else None
    return NOT_MEASURED if error is None else f"{100 * error:.2f}"


def _delta(compared: CompareResult | None) -> Cell | str:
    if compared is None:
        return NOT_MEASURED
    return with_interval(compared.delta_ln_ppl, compared.low, compared.high)


def _p_value(compared: CompareResult | None) -> Cell | str:
    if compared is None or compared.p_value is None:
        return NOT_MEASURED
    return p_text(compared.p_value).removeprefix("p ").removeprefix("= ")


def _divergence(compared: CompareResult | None) -> tuple[Cell | str, Cell | str]:
    divergence = compared.divergence if compared else None
    if divergence is None:
        return NOT_MEASURED, NOT_MEASURED
    return f"{divergence.mean:.5f}", f"{100 * divergence.top1_agreement:.2f}"
