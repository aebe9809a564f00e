"""One verdict a claim: what was measured first, then what cannot be, then what the card says against itself.

============  ========================================================================================
holds         a comparable run is within tolerance; or arithmetic, or the published configuration, proves it
fails         every comparable run is outside; or the published configuration says otherwise
impossible    it breaks arithmetic or a physical bound
contradicted  another claim of the card cannot be true beside it
not measured  nothing here speaks for or against it; the verdict says what would
============  ========================================================================================

Of two claims that contradict one another, one that holds keeps its verdict: the other is then the wrong one.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from evalsuite.core.record import Record
from evalsuite.report.choose import bears_witness
from evalsuite.report.claim_bounds import RULES as BOUND_RULES
from evalsuite.report.claim_evidence import Evidence, evidence, is_of
from evalsuite.report.claim_findings import Finding, in_unit
from evalsuite.report.claim_rivals import RULES as RIVAL_RULES
from evalsuite.report.claim_rivals import rests_on
from evalsuite.report.claim_rules import RULES as ARITHMETIC_RULES
from evalsuite.report.claims import Claim, Claims

Verdict = Literal["impossible", "contradicted", "fails", "holds", "not measured"]
VERDICTS: tuple[Verdict, ...] = ("impossible", "contradicted", "fails", "holds", "not measured")
RULES = (*ARITHMETIC_RULES, *BOUND_RULES, *RIVAL_RULES)
Said = tuple[str, Finding]
REFUTED: frozenset[str] = frozenset({"impossible", "contradicted", "fails"})


@dataclass(frozen=True)
class Errand:
    """One command that measures claims: several sizes of the cache are one sweep."""

    kind: str
    model: str
    gpu: str | None
    text: str | None
    caches: tuple[int | str, ...] = ()
    policy: str | None = None
    modes: tuple[str, ...] = ()

    def command(self) -> str:
        words = ["hlwq-eval", self.kind, self.model]
        if self.kind == "ppl":
            words.append("--protocol card-1155" if self.text is None else "--corpus FILE")
        caches = ",".join(map(str, self.caches))
        if self.kind == "speed" and self.caches not in ((), ("all",)):
            words.append(f"--cache-sizes {caches}")
        elif self.caches not in ((), ("all",)):
            words.append(f"--moe-expert-cache-size {caches}")
        if self.policy is not None:
            words.append(f"--moe-expert-cache-policy {self.policy}")
        if self.kind == "speed" and self.modes:
            words.append(f"--modes {','.join(self.modes)}")
        return " ".join(words)


@dataclass(frozen=True)
class Judged:
    """A claim with its verdict.

    Attributes:
        shown: the measured or derived number, empty where there is none.
        origin: where `shown` comes from.
        why: the reason; of ``not measured``, what is missing.
        notes: questions worth asking, whatever the verdict.
        todo: what would measure it, where a command does.
        rules: the rules that spoke; runs: the records that did.
        number: what was measured, in the metric's base unit.
    """

    claim: Claim
    verdict: Verdict
    shown: str
    origin: Literal["measured", "derived", "not measured"]
    why: str
    notes: tuple[str, ...] = ()
    todo: Errand | None = None
    rules: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()
    number: float | None = None


def judge(claims: Claims, records: Sequence[Record] = ()) -> list[Judged]:
    """A verdict for every claim, in the order of the file."""
    runs = {
        key: [record for record in records if bears_witness(record) and is_of(record, model)]
        for key, model in claims.models.items()
    }
    said: dict[str, list[Said]] = defaultdict(list)
    for rule in RULES:
        for finding in rule(claims):
            said[finding.claim].append((rule.__name__, finding))
    judged = {c.id: _judge(claims, c, said[c.id], runs[c.model]) for c in claims.claim}
    for finding in rests_on(claims, {name for name, found in judged.items() if found.verdict in REFUTED}):
        said[finding.claim].append((rests_on.__name__, finding))
    for claim in claims.claim:
        if claim.of is not None or claim.sum_of:
            whole = _judge(claims, claim, said[claim.id], runs[claim.model])
            judged[claim.id] = _from_parts(whole, [judged[name] for name in claim.of or claim.sum_of])
    return [judged[claim.id] for claim in claims.claim]


def _judge(claims: Claims, claim: Claim, said: Sequence[Said], runs: Sequence[Record]) -> Judged:
    found, missing = evidence(claim, runs)
    notes = tuple(dict.fromkeys(finding.why for _, finding in said if finding.kind == "note"))
    if found:
        return _measured(claim, found, notes)
    for kind in ("impossible", "holds", "fails", "contradicted"):
        speaking = [(name, finding) for name, finding in said if finding.kind == kind]
        if speaking:
            shown = next((f.shown for _, f in speaking if f.shown), "") or _shown(said)
            return Judged(
                claim,
                kind,
                shown,
                "derived" if shown else "not measured",
                "; ".join(dict.fromkeys(finding.why for _, finding in speaking)),
                notes,
                errand(claims, claim) if kind == "contradicted" else None,
                tuple(dict.fromkeys(name for name, _ in speaking)),
            )
    agreeing = [(name, finding) for name, finding in said if finding.kind == "agrees"]
    shown = _shown(said)
    return Judged(
        claim,
        "not measured",
        shown,
        "derived" if shown else "not measured",
        "; ".join((missing, *(finding.why for _, finding in agreeing))),
        notes,
        todo=errand(claims, claim),
        rules=tuple(name for name, _ in agreeing),
    )


def _from_parts(whole: Judged, parts: Sequence[Judged]) -> Judged:
    """A ratio or a sum, judged anew where its parts were all measured, or all hold."""
    claim = whole.claim
    numbers = [part.number for part in parts if part.number is not None]
    if len(numbers) < len(parts) or (claim.of is not None and numbers[1] == 0):
        if whole.verdict == "not measured" and all(part.verdict == "holds" for part in parts):
            why = whole.why.partition("; ")[2]
            return replace(whole, verdict="holds", why=f"{why}, and its parts hold", todo=None)
        return whole
    number = numbers[0] / numbers[1] if claim.of is not None else sum(numbers)
    shown, sign = in_unit(number, claim), " / " if claim.of is not None else " + "
    return replace(
        whole,
        verdict="holds" if claim.allows(number) else "fails",
        shown=shown,
        origin="measured",
        why=sign.join(part.shown for part in parts) + f" = {shown}, as measured",
        todo=None,
        rules=("measured",),
        runs=tuple(dict.fromkeys(run for part in parts for run in part.runs)),
        number=number,
    )


def _shown(said: Sequence[Said]) -> str:
    return next((finding.shown for _, finding in said if finding.shown), "")


def _measured(claim: Claim, found: Sequence[Evidence], notes: tuple[str, ...]) -> Judged:
    number = claim.number
    assert number is not None
    nearest = min(found, key=lambda item: abs(item.number - number))
    one = number if claim.low is None else 0.0  # of a range there is no such number
    ratio = f", {nearest.number / one:.3g} times the claim" if one else ""
    dummy = "; with dummy weights of the same geometry" if nearest.dummy else ""
    shown = dict.fromkeys(f"{item.quantity} {in_unit(item.number, claim)}" for item in found)
    others = [text for text in shown if text != f"{nearest.quantity} {in_unit(nearest.number, claim)}"]
    also = f"; also {', '.join(others[:3])}" if others else ""
    return Judged(
        claim,
        "holds" if claim.allows(nearest.number) else "fails",
        in_unit(nearest.number, claim),
        "measured",
        f"{nearest.quantity} {in_unit(nearest.number, claim)} in {nearest.run_id}{ratio}{dummy}{also}",
        notes,
        rules=("measured",),
        runs=tuple(dict.fromkeys(item.run_id for item in found)),
        number=nearest.number,
    )


def errand(claims: Claims, claim: Claim) -> Errand | None:
    """What would measure a claim; None where no command does, or the card names no checkpoint."""
    kind, model = claim.kind.command, claims.models[claim.model]
    if kind is None or claim.number is None or not model.names:
        return None
    caches = () if claim.cache is None else (claim.cache,)
    modes = () if claim.mode is None else (claim.mode,)
    known = claim.text is None or claim.text in claims.texts
    return Errand(kind, model.names[0], claim.gpu, None if known else claim.text, caches, claim.policy, modes)
