"""The one table of an experiment: every arm against the baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from evalsuite.core.record import CompareResult, PerplexityResult, QuantizeResult, Record
from evalsuite.core.units import si_bytes
from evalsuite.report.perplexity import p_text, plus_minus, with_interval
from evalsuite.report.quantization import recipe_text
from evalsuite.report.tables import NOT_MEASURED, Cell, Column, Table


@dataclass(frozen=True)
class ArmResult:
    """A row of the table.

    Attributes:
        bits_per_weight: of the codes, also where the weights were scored as decoded.
        compared, quantized: None for the baseline.
    """

    name: str
    bits_per_weight: float
    perplexity: PerplexityResult
    compared: CompareResult | None
    quantized: QuantizeResult | None

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "bits_per_weight": self.bits_per_weight,
            "perplexity": self.perplexity.model_dump(mode="json"),
            "compared": self.compared and self.compared.model_dump(mode="json"),
            "quantized": self.quantized and self.quantized.model_dump(mode="json"),
        }


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


def plan_table(question: str, arms: Sequence[PlannedArm], windows: int, protocol: str) -> Table[PlannedArm]:
    """What an experiment would do."""
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
        f"Each arm scores {windows:,} windows: {protocol}. What is missing writes {si_bytes(total)} in all; "
        "one arm's checkpoint at a time is on the disk, unless the file says keep.",
    )


def experiment_table(question: str, arms: Sequence[ArmResult], baseline: Record) -> Table[ArmResult]:
    """Perplexity, its paired difference, divergence and agreement of each arm.

    Args:
        baseline: the run that the others are compared with; the caption says what it ran on.
    """
    text, protocol, model = baseline.text, baseline.protocol, baseline.model
    assert text is not None
    assert protocol is not None
    assert model is not None
    scored = arms[0].perplexity
    return Table(
        question,
        (
            Column[ArmResult]("arm", lambda a: a.name),
            Column[ArmResult]("bits", lambda a: f"{a.bits_per_weight:.3f}", better="lower"),
            Column[ArmResult]("error", _error, "%", "lower"),
            Column[ArmResult](
                "PPL",
                lambda a: plus_minus(a.perplexity.perplexity, a.perplexity.low, a.perplexity.high),
                better="lower",
            ),
            Column[ArmResult]("Δ ln PPL", _delta, better="lower"),
            Column[ArmResult]("p", _p_value),
            Column[ArmResult]("KL", lambda a: _divergence(a)[0], "nats", "lower"),
            Column[ArmResult]("top-1", lambda a: _divergence(a)[1], "%", "higher"),
        ),
        arms,
        f"{model.name} on {text.corpus}, {protocol.describe()}; {scored.windows:,} windows, "
        f"{scored.scored_tokens:,} scored tokens; {model.computed} ({model.device_name}). Bits: stored per "
        "quantized weight with scales, norms and shapes; decoded arms count the codes that they were decoded "
        "from. Error: ‖W − Ŵ‖ / ‖W‖ over the quantized weights. ± is half the 95 % interval over windows, "
        f"which is mostly the text's own variation; Δ ln PPL with its 95 % interval and p-value, mean KL "
        f"divergence and the share of tokens with the same most likely token are against {arms[0].name}, "
        "paired by window.",
    )


def _error(arm: ArmResult) -> Cell | str:
    error = arm.quantized.total.relative_error if arm.quantized else None
    return NOT_MEASURED if error is None else f"{100 * error:.2f}"


def _delta(arm: ArmResult) -> Cell | str:
    if arm.compared is None:
        return NOT_MEASURED
    return with_interval(arm.compared.delta_ln_ppl, arm.compared.low, arm.compared.high)


def _p_value(arm: ArmResult) -> Cell | str:
    if arm.compared is None or arm.compared.p_value is None:
        return NOT_MEASURED
    return p_text(arm.compared.p_value).removeprefix("p ").removeprefix("= ")


def _divergence(arm: ArmResult) -> tuple[Cell | str, Cell | str]:
    divergence = arm.compared.divergence if arm.compared else None
    if divergence is None:
        return NOT_MEASURED, NOT_MEASURED
    return f"{divergence.mean:.5f}", f"{100 * divergence.top1_agreement:.2f}"
