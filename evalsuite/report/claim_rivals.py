"""Claims held against the other claims of the same card.

Two claims are rivals where model and metric are the same, every condition that decides the metric is the same
(stated alike, or stated by neither), and no other condition that both state differs.
"""

from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations

from evalsuite.core.units import si_bytes
from evalsuite.report.claim_findings import Finding, Rule, written
from evalsuite.report.claim_rules import of_metric
from evalsuite.report.claims import Claim, Claims, Conditions

# flags that run or need code from elsewhere, and the claim of none that they contradict
NEEDS = {"--trust-remote-code": "custom_code"}
DIGITS_THAT_ARE_NO_CHANCE = 3


def compatible(one: Claim, other: Claim) -> bool:
    """Whether both may speak of the same measurement."""
    if (one.model, one.metric) != (other.model, other.metric):
        return False
    for key in (*Conditions.model_fields, "of"):
        here, there = getattr(one, key), getattr(other, key)
        decides = key in one.kind.decides
        if here != there and (decides or (here is not None and there is not None)):
            return False
    return True


def disjoint(one: Claim, other: Claim) -> bool:
    """Whether no value satisfies both."""
    if one.metric == "flag":
        return one.value != other.value and "removed" in (one.value, other.value)
    here, there = one.interval, other.interval
    if here is None or there is None:
        return False
    return here[1] < there[0] or there[1] < here[0]


def rival_figures(claims: Claims) -> Iterator[Finding]:
    """Two figures for one thing under the same conditions, further apart than both tolerances."""
    against: dict[str, list[Claim]] = defaultdict(list)
    for one, other in combinations(claims.claim, 2):
        if compatible(one, other) and disjoint(one, other):
            against[one.id].append(other)
            against[other.id].append(one)
    for claim_id, others in against.items():
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        why = f"the card also says {written(others[0])}{more}"
        yield Finding(claim_id, "contradicted", why, rivals=tuple(other.id for other in others))


def one_figure_for_two_caches(claims: Claims) -> Iterator[Finding]:
    """One memory figure for two numbers of slots, where the experts between them are more than its error."""
    found = [
        (c, n)
        for c, n in of_metric(claims, "vram", "expert_buffer")
        if isinstance(c.cache, int) and c.low is None
    ]
    against: dict[str, dict[str, Claim]] = defaultdict(dict)
    for (one, a), (other, b) in combinations(found, 2):
        shape = claims.shape(one)
        if shape is None or one.model != other.model or a != b or one.cache == other.cache:
            continue
        assert isinstance(one.cache, int)
        assert isinstance(other.cache, int)
        geometry, stored = shape
        between = abs(geometry.buffer_bytes(stored, one.cache) - geometry.buffer_bytes(stored, other.cache))
        assert one.interval is not None
        assert other.interval is not None
        if between > max(one.interval[1], other.interval[1]) - min(one.interval[0], other.interval[0]):
            against[one.id][other.id] = other
            against[other.id][one.id] = one
    for claim_id, others in against.items():
        claim, other = claims.by_id(claim_id), next(iter(others.values()))
        shape = claims.shape(claim)
        assert shape is not None
        assert isinstance(claim.cache, int)
        assert isinstance(other.cache, int)
        here, there = (shape[0].buffer_bytes(shape[1], n) for n in (claim.cache, other.cache))
        yield Finding(
            claim_id,
            "contradicted",
            f"the same figure stands for {other.cache} slots ({other.id}), whose experts take "
            f"{si_bytes(there)}; those of {claim.cache} take {si_bytes(here)}",
            rivals=tuple(others),
        )


def taken_elsewhere(claims: Claims) -> Iterator[Finding]:
    """A figure given under conditions under which, as the card says itself, it was not taken."""
    for witness in claims.claim:
        excluded = witness.excludes.stated()
        if not excluded:
            continue
        for claim in claims.claim:
            same = (claim.model, claim.metric, claim.value) == (witness.model, witness.metric, witness.value)
            if same and all(getattr(claim, key) == value for key, value in excluded.items()):
                what = ", ".join(f"{key} {value}" for key, value in excluded.items())
                yield Finding(
                    claim.id,
                    "contradicted",
                    f"given for {what}; the card says that it was taken otherwise ({witness.id})",
                    rivals=(witness.id,),
                )


def overflow_without_need(claims: Claims) -> Iterator[Finding]:
    """An overflow takes more distinct experts than there are slots."""
    for claim, _ in of_metric(claims, "overflow"):
        bounds = claim.interval
        assert bounds is not None
        most = [
            (other, other.high or number)
            for other, number in of_metric(claims, "distinct_experts")
            if other.model == claim.model and claim.phase in (None, other.phase)
        ]
        if bounds[0] <= 0 or not most or not isinstance(claim.cache, int):
            continue
        other, highest = max(most, key=lambda found: found[1])
        if highest <= claim.cache:
            yield Finding(
                claim.id,
                "contradicted",
                f"{claim.cache} slots hold {written(other)} without overflow",
                rivals=(other.id,),
            )
            yield Finding(
                other.id,
                "contradicted",
                f"so few never overflow {claim.cache} slots, as {claim.id} says that they do",
                rivals=(claim.id,),
            )


def code_of_its_own(claims: Claims) -> Iterator[Finding]:
    """No code of its own, and a flag that runs such code."""
    for claim in claims.claim:
        for flag in claims.claim:
            if (
                flag.model == claim.model
                and claim.number == 0
                and flag.flag is not None
                and NEEDS.get(flag.flag) == claim.metric
                and flag.value in ("required", "used")
            ):
                yield Finding(
                    claim.id,
                    "contradicted",
                    f"the card's command has {flag.flag} ({flag.id})",
                    rivals=(flag.id,),
                )
                break


def rests_on(claims: Claims, refuted: set[str]) -> Iterator[Finding]:
    """A ratio or a sum of figures that do not stand."""
    for claim in claims.claim:
        bad = [claims.by_id(other) for other in (*(claim.of or ()), *claim.sum_of) if other in refuted]
        if bad:
            why = f"it rests on {written(bad[0])}, which does not stand"
            yield Finding(claim.id, "contradicted", why, rivals=tuple(other.id for other in bad))


def same_number_elsewhere(claims: Claims) -> Iterator[Finding]:
    """One measured figure of three digits or more for different models."""
    groups: dict[tuple[str, float], dict[str, list[Claim]]] = defaultdict(lambda: defaultdict(list))
    for claim, number in of_metric(claims, "perplexity", "speed"):
        digits = len(f"{number:.12g}".replace(".", "").strip("0"))
        if digits >= DIGITS_THAT_ARE_NO_CHANCE:
            groups[claim.metric, number][claim.model].append(claim)
    for (metric, _), by_model in groups.items():
        for model, found in by_model.items():
            others = [name for name in by_model if name != model]
            if others:
                title = claims.models[others[0]].title
                why = f"the same {metric} to the last digit stands for another model: {title}"
                yield from (Finding(claim.id, "note", why) for claim in found)


def baseline_without_quality(claims: Claims) -> Iterator[Finding]:
    """A baseline that was run for its speed, and whose perplexity is left out."""
    compared = {claims.by_id(claim.of[1]).model for claim in claims.claim if claim.of is not None}
    ran = {claim.model for claim, _ in of_metric(claims, "speed")}
    for claim in claims.claim:
        if claim.metric == "perplexity" and claim.words is not None and claim.model in compared & ran:
            why = "the baseline ran, its speed is given: without its perplexity no loss of quality is known"
            yield Finding(claim.id, "note", why)


def words_for_number(claims: Claims) -> Iterator[Finding]:
    """Words where a number should be, other than that there is none."""
    for claim in claims.claim:
        if claim.words is not None and claim.words.strip("-–— ") not in ("", "not measured", "n/a"):
            unit = next(iter(claim.kind.units))
            why = f"words where {f'{unit} ' if unit else ''}should stand: are the row's columns shifted?"
            yield Finding(claim.id, "note", why)


def faster_with_less(claims: Claims) -> Iterator[Finding]:
    """A cache that is faster than all experts on the GPU does the same work, and copies besides."""
    found = [c for c, _ in of_metric(claims, "speed")]
    for claim in found:
        for whole in found:
            if (
                isinstance(claim.cache, int)
                and whole.cache == "all"
                and (claim.model, claim.gpu) == (whole.model, whole.gpu)
                and claim.gpu is not None
                and disjoint(claim, whole)
                and (claim.number or 0) > (whole.number or 0)
            ):
                why = f"faster than {written(whole)} with every expert on the GPU: which work does it save?"
                yield Finding(claim.id, "note", why)
                break


RULES: tuple[Rule, ...] = (
    rival_figures,
    one_figure_for_two_caches,
    taken_elsewhere,
    overflow_without_need,
    code_of_its_own,
    same_number_elsewhere,
    baseline_without_quality,
    words_for_number,
    faster_with_less,
)
