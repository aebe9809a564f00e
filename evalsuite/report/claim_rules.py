"""Claims held against arithmetic and published configurations; nothing is measured here."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise

from evalsuite.core.protocol import PROTOCOLS
from evalsuite.core.units import si_bytes
from evalsuite.report.claim_findings import Finding, Rule, in_unit, written
from evalsuite.report.claim_geometry import Geometry, Stored
from evalsuite.report.claims import Claim, Claims

# a checkpoint may hold what the text model does not: a vision tower, a draft head, a tokenizer
EXTRAS = 0.10
CONFIGURED = {
    "layers": "num_hidden_layers",
    "experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
}


def of_metric(claims: Claims, *names: str) -> Iterator[tuple[Claim, float]]:
    """Claims of these metrics that have a number, with it."""
    for claim in claims.claim:
        number = claim.number
        if claim.metric in names and number is not None:
            yield claim, number


def experts_per_token(claims: Claims, claim: Claim) -> int | None:
    """As published: the geometry's, or the model's own entry."""
    model = claims.models[claim.model]
    if model.geometry is not None:
        return claims.geometry[model.geometry].num_experts_per_tok
    published = model.published.get("experts_per_token")
    return None if published is None else round(published)


def layers_against_files(claims: Claims) -> Iterator[Finding]:
    """The layers that a card counts must make up the files that it offers."""
    for claim, layers in of_metric(claims, "layers"):
        shape = claims.shape(claim)
        for files, stated in of_metric(claims, "download"):
            if shape is None or files.model != claim.model:
                continue
            geometry, stored = shape
            size = geometry.with_layers(round(layers)).checkpoint_bytes(stored)
            if not stated * (1 - EXTRAS) <= size <= stated * (1 + EXTRAS):
                whole = geometry.checkpoint_bytes(stored)
                yield Finding(
                    claim.id,
                    "impossible",
                    f"{round(layers)} layers make {si_bytes(size)} of {stored} weights, not "
                    f"{written(files)}; {geometry.num_hidden_layers} layers make {si_bytes(whole)}",
                    si_bytes(size),
                )
                break


def published(claims: Claims) -> Iterator[Finding]:
    """What the publisher's configuration says of the same quantity."""
    for claim in claims.claim:
        model, number = claims.models[claim.model], claim.number
        fact = model.published.get(claim.metric)
        if fact is None and model.geometry is not None and claim.metric in CONFIGURED:
            fact = float(getattr(claims.geometry[model.geometry], CONFIGURED[claim.metric]))
        if fact is None or number is None:
            continue
        shown = f"{fact:,.12g}"
        if claim.allows(fact):
            yield Finding(claim.id, "holds", "the published configuration says the same", shown)
        else:
            yield Finding(claim.id, "fails", f"the published configuration has {shown}", shown)


def derived_size(claim: Claim, geometry: Geometry, stored: Stored) -> float | None:
    """Bytes or weights that follow from the geometry, where the metric is such a quantity."""
    match claim.metric:
        case "download":
            return geometry.checkpoint_bytes(stored)
        case "parameters":
            return float(geometry.parameters)
        case "active_parameters":
            return float(geometry.active_parameters)
        case "expert_buffer":
            slots = geometry.num_experts if claim.cache == "all" else claim.cache
            return None if slots is None else geometry.buffer_bytes(stored, slots)
        case _:
            return None


def sizes(claims: Claims) -> Iterator[Finding]:
    """Sizes recomputed from the geometry; files may exceed it by what else they hold, not fall short."""
    for claim, number in of_metric(claims, "download", "parameters", "active_parameters", "expert_buffer"):
        shape = claims.shape(claim)
        size = None if shape is None else derived_size(claim, *shape)
        if size is None:
            continue
        shown = in_unit(size, claim)
        if claim.allows(size):
            yield Finding(claim.id, "holds", f"the geometry gives {shown}", shown)
        elif claim.metric == "download" and size < number <= size * (1 + EXTRAS):
            yield Finding(claim.id, "agrees", f"the text model alone is {shown}", shown)
        else:
            yield Finding(claim.id, "impossible", f"the geometry gives {shown}", shown)


def quotients(claims: Claims) -> Iterator[Finding]:
    """A ratio is the quotient of the two claims that it names."""
    for claim, _ in of_metric(claims, "ratio"):
        assert claim.of is not None
        over, under = map(claims.by_id, claim.of)
        if over.number is None or not under.number:
            continue
        quotient = over.number / under.number
        sum_text = f"{over.text_of()} / {under.text_of()} = {quotient:.3g}"
        yield Finding(
            claim.id, "agrees" if claim.allows(quotient) else "impossible", sum_text, f"{quotient:.3g}×"
        )


def sums(claims: Claims) -> Iterator[Finding]:
    """A sum is that of the claims it names."""
    for claim in claims.claim:
        if not claim.sum_of:
            continue
        parts = [claims.by_id(part) for part in claim.sum_of]
        total = sum(part.number or 0.0 for part in parts)
        text = " + ".join(part.text_of() for part in parts) + f" = {in_unit(total, claim)}"
        kind = "agrees" if claim.allows(total) else "impossible"
        yield Finding(claim.id, kind, text, in_unit(total, claim))


def windows_and_tokens(claims: Claims) -> Iterator[Finding]:
    """Every window of a protocol scores the same number of tokens: windows × that = tokens."""
    groups: dict[tuple[str, str | None], list[tuple[Claim, float]]] = defaultdict(list)
    for claim, tokens in of_metric(claims, "scored_tokens"):
        if claim.windows is not None:
            groups[claim.model, claim.text].append((claim, tokens / claim.windows))
    for group in groups.values():
        usual = Counter(each for _, each in group).most_common(1)[0][0]
        for claim, each in group:
            if each == usual and each == int(each):
                why = f"{claim.windows:,} windows × {each:.0f}"
                yield Finding(claim.id, "holds", why, f"{each:.0f} a window")
            else:
                yield Finding(
                    claim.id,
                    "impossible",
                    f"{each:.6g} tokens in each of {claim.windows:,} windows; the card's other counts make "
                    f"{usual:.6g}",
                    f"{each:.6g} a window",
                )


def windows_of_text(claims: Claims) -> Iterator[Finding]:
    """Which known protocol cuts the text into that many windows."""
    for claim, number in of_metric(claims, "windows"):
        if claim.text not in claims.texts:
            continue
        tokens = claims.texts[claim.text].tokens
        counts = {
            p.name: (tokens - p.context) // p.stride + 1
            for p in PROTOCOLS.values()
            if p.tail == "drop" and p.join == "blank-line"
        }
        fits = [name for name, count in counts.items() if count == number]
        if fits:
            why = f"{tokens:,} tokens make as many under protocol {fits[0]}, which the card does not name"
            yield Finding(claim.id, "holds", why, f"{number:,.0f}")
        else:
            others = ", ".join(f"{count:,} under {name}" for name, count in counts.items())
            yield Finding(claim.id, "note", f"no known protocol gives it: {tokens:,} tokens make {others}")


def prefixes(claims: Claims) -> Iterator[Finding]:
    """Perplexities of growing prefixes imply one for each segment: its nats cannot be negative."""
    groups: dict[tuple[str, str | None], dict[int, tuple[Claim, float]]] = defaultdict(dict)
    for claim, number in of_metric(claims, "perplexity"):
        if claim.windows is not None and number > 0 and not claim.excludes.stated() and claim.cache is None:
            groups[claim.model, claim.text].setdefault(claim.windows, (claim, number))
    for group in groups.values():
        marks = sorted(group)
        for start, stop in pairwise(marks):
            (_, before), (claim, after) = group[start], group[stop]
            nats = stop * math.log(after) - start * math.log(before)
            implied = math.exp(nats / (stop - start))
            why = f"windows {start:,} to {stop:,} must then have {implied:.2f}"
            yield Finding(claim.id, "agrees" if implied >= 1 else "impossible", why, f"{implied:.2f} there")


RULES: tuple[Rule, ...] = (
    layers_against_files,
    published,
    sizes,
    quotients,
    sums,
    windows_and_tokens,
    windows_of_text,
    prefixes,
)
