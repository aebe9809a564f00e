"""What a rule finds about a claim, and how numbers are written in its reasons."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from evalsuite.core.units import si_bytes
from evalsuite.report.claims import Claim, Claims

Kind = Literal["impossible", "contradicted", "fails", "holds", "agrees", "note"]


@dataclass(frozen=True)
class Finding:
    """One rule's word on one claim.

    Attributes:
        kind: ``holds`` is proven without a measurement; ``agrees`` is only free of contradiction; a ``note``
            is a question worth asking.
        shown: the number that was derived, with its unit.
        rivals: of a contradiction, the claims on its other side.
    """

    claim: str
    kind: Kind
    why: str
    shown: str = ""
    rivals: tuple[str, ...] = ()


Rule = Callable[[Claims], Iterator[Finding]]


def written(claim: Claim) -> str:
    """``~10 tok/s (tune-8-speed)``."""
    return f"{claim.text_of()} ({claim.id})"


def in_unit(number: float, claim: Claim) -> str:
    """A number in base units as the claim would give it."""
    if claim.unit.endswith("B"):
        return (
            si_bytes(number)
            if claim.unit in ("GB", "MB", "TB")
            else f"{number / claim.factor:.3g} {claim.unit}"
        )
    value = number / claim.factor
    text = f"{value:,.0f}" if value == int(value) else f"{value:.3g}"
    return f"{text}×" if claim.unit == "x" else f"{text} {claim.unit}".rstrip()
