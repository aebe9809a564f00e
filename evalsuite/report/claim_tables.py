"""The tables of a claims check: what does not stand first, what it would take to know more last."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from evalsuite.report.claim_verdicts import VERDICTS, Errand, Judged
from evalsuite.report.claims import Claim, Claims
from evalsuite.report.tables import NOT_MEASURED, Cell, Column, Table

TITLES = {
    "impossible": "impossible",
    "contradicted": "contradicted by the card itself",
    "fails": "fails",
    "holds": "holds",
    "not measured": "not measured here",
}
SHOWN = 6

Group = Sequence[Judged]
Shared = tuple[str, Group]
Planned = tuple[Errand, Group]


def counts(judged: Group) -> dict[str, int]:
    """How many claims have each verdict; every verdict is there."""
    found = Counter(item.verdict for item in judged)
    return {verdict: found[verdict] for verdict in VERDICTS}


def summary(judged: Group) -> str:
    """``145 claims: 4 impossible, 27 contradicted by the card itself, …``"""
    parts = (f"{number} {TITLES[verdict]}" for verdict, number in counts(judged).items() if number)
    return f"{len(judged)} claims: {', '.join(parts)}."


def claimed(claim: Claim) -> str:
    """The number with those of its conditions that decide it: ``37.4 tok/s (RTX PRO 6000, cache 8)``."""
    shown: list[str] = []
    for key, value in claim.stated().items():
        if key in ("flag", "argument", claim.metric) or (key == "text" and claim.windows is not None):
            continue
        if key == "windows":
            shown.append(f"{value:,} windows")
        elif key == "cache":
            shown.append(f"cache {value}")
        elif key in claim.kind.decides:
            shown.append(str(value))
    return claim.text_of() + (f" ({', '.join(shown)})" if shown else "")


def _some(words: Iterable[str]) -> str:
    """The first distinct ones, and how many more there are."""
    distinct = list(dict.fromkeys(words))
    more = len(distinct) - SHOWN
    return ", ".join(distinct[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _names(rows: Group) -> str:
    return _some(row.claim.id for row in rows)


def _found(rows: Group) -> Cell:
    return NOT_MEASURED if rows[0].origin == "not measured" else Cell(rows[0].shown, rows[0].origin)


CLAIM = Column[Group]("claim", _names, prose=20)
WHERE = Column[Group]("where", lambda g: _some(r.claim.where for r in g), prose=14)
CLAIMED = Column[Group]("claimed", lambda g: _some(claimed(r.claim) for r in g), prose=24)
FOUND = Column[Group]("found", _found, prose=14)
VERDICT = Column[Group]("verdict", lambda g: TITLES[g[0].verdict].partition(" by")[0])
WHY = Column[Group]("why", lambda g: g[0].why, prose=38)


def claim_tables(claims: Claims, judged: Group) -> Iterator[Table[Any]]:
    """What does not stand, questions, what holds, what was not measured, and what that would take.

    Claims of one section after another that say the same, and fare the same, share a row.
    """
    refuted = _alike(judged, ("impossible", "contradicted", "fails"))
    if refuted:
        yield Table(
            f"{claims.card.title}: what does not stand",
            (VERDICT, CLAIM, WHERE, CLAIMED, WHY),
            refuted,
            "Contradicted: by another claim of the card, named in brackets; one of the two is wrong.",
        )
    if questions := _by_note(judged):
        yield Table(
            "Questions worth asking",
            (
                Column[Shared]("claim", lambda r: _names(r[1]), prose=30),
                Column[Shared]("claimed", lambda r: claimed(r[1][0].claim), prose=20),
                Column[Shared]("question", lambda r: r[0], prose=40),
            ),
            questions,
            "These are no verdicts.",
        )
    if holding := _alike(judged, ("holds",)):
        yield Table("What holds", (CLAIM, WHERE, CLAIMED, FOUND, WHY), holding)
    if unmeasured := _alike(judged, ("not measured",)):
        yield Table(
            "Not measured here",
            (CLAIM, WHERE, CLAIMED, FOUND, WHY),
            unmeasured,
            "Derived are bounds, and what a claim implies: they speak neither for it nor against it.",
        )
    if planned := _by_errand(judged):
        yield Table(
            "What would settle the rest",
            (
                Column[Planned]("command", lambda r: r[0].command(), prose=50),
                Column[Planned]("on", lambda r: r[0].gpu or "a GPU that it fits", prose=12),
                Column[Planned]("claims", lambda r: str(len(r[1]))),
            ),
            planned,
        )


def _alike(judged: Group, verdicts: Sequence[str]) -> list[Group]:
    """Claims that say the same and fare the same; with nothing found, a section's with one reason."""
    groups: dict[tuple[str, ...], list[Judged]] = defaultdict(list)
    for verdict in verdicts:
        for item in judged:
            if item.verdict == verdict:
                key = (verdict, item.claim.model, claimed(item.claim), item.shown, item.why)
                if item.verdict == "not measured" and not item.shown:
                    key = (verdict, item.claim.where, item.why)
                groups[key].append(item)
    return list(groups.values())


def _by_note(judged: Group) -> list[Shared]:
    groups: dict[tuple[str, str], list[Judged]] = defaultdict(list)
    for item in judged:
        for note in item.notes:
            groups[note, item.claim.text_of()].append(item)
    return [(note, found) for (note, _), found in groups.items()]


def _by_errand(judged: Group) -> list[Planned]:
    """One sweep a model, GPU and text; those that measure most claims first."""
    groups: dict[tuple[str | None, ...], list[tuple[Errand, Judged]]] = defaultdict(list)
    gpus: dict[tuple[str | None, ...], str] = {}
    for todo, item in ((item.todo, item) for item in judged):
        if todo is not None:
            size = None if todo.kind == "speed" or todo.caches in ((), ("all",)) else str(todo.caches)
            key = (todo.kind, todo.model, todo.text, size)
            groups[(*key, todo.gpu)].append((todo, item))
            if todo.gpu is not None:
                gpus.setdefault(key, todo.gpu)
    for *key, gpu in list(groups):
        # a claim that names no GPU is measured along with one that does
        if gpu is None and tuple(key) in gpus:
            groups[(*key, gpus[tuple(key)])] += groups.pop((*key, None))
    planned: list[Planned] = []
    for (*_, gpu), found in groups.items():
        caches = {cache for todo, _ in found for cache in todo.caches}
        sizes = (*sorted(c for c in caches if isinstance(c, int)), *(c for c in caches if c == "all"))
        modes = tuple(sorted({mode for todo, _ in found for mode in todo.modes}))
        policy = next((todo.policy for todo, _ in found if todo.policy is not None), None)
        open_mode = any(not todo.modes for todo, _ in found)  # the command's default is both
        whole = replace(found[0][0], caches=sizes, policy=policy, modes=() if open_mode else modes, gpu=gpu)
        planned.append((whole, [item for _, item in found]))
    return sorted(planned, key=lambda plan: -len(plan[1]))


def document(claims: Claims, judged: Group, skipped: Sequence[str]) -> dict[str, Any]:
    """Everything as JSON: the card, the counts, every claim with its verdict, and records left out."""
    return {
        "card": claims.card.model_dump(),
        "counts": counts(judged),
        "skipped_records": list(skipped),
        "claims": [
            {
                **item.claim.model_dump(mode="json", exclude_defaults=True),
                "claimed": item.claim.text_of(),
                "verdict": item.verdict,
                "found": item.shown or None,
                "origin": item.origin,
                "measured": item.number,
                "why": item.why,
                "notes": list(item.notes),
                "to_measure": None if item.todo is None else item.todo.command(),
                "rules": list(item.rules),
                "runs": list(item.runs),
            }
            for item in judged
        ],
    }
