"""Two results folders: what changed between runs of the same spec.

Runs are matched by what was asked for: the model's name, protocol or serving, and workload; which GPU of
several equal ones does not matter. Speeds are matched on one kind of device: a run on another has no partner.
Perplexities must be of one text and tokenizer: else a pair is listed with the reason why it is not compared.
They are compared across devices, and everything across drivers and libraries, as what a new one changes may
be the question: what differs of these is named.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from evalsuite.core.record import Record
from evalsuite.core.spec import (
    CompareSpec,
    FootprintSpec,
    PerplexitySpec,
    QuantizeSpec,
    Spec,
    SpeedSpec,
    canonical_json,
)
from evalsuite.core.units import decimals_for
from evalsuite.report.apart import names_apart
from evalsuite.report.changes import METRICS, Metric, Number, Shift, absolute, paired_perplexity, relative
from evalsuite.report.choose import device_of, model_of, perplexity_condition
from evalsuite.report.limits import Limit
from evalsuite.report.naming import what
from evalsuite.report.perplexity import plus_minus
from evalsuite.report.speed import ENDINGS
from evalsuite.report.surroundings import Surrounding, surroundings
from evalsuite.report.tables import NOT_MEASURED, Cell, Column, Table
from evalsuite.store.runs import StoredRun

MAIN = {"ppl", "decode_tok_s", "weights_gb", "vram_gb", "delta_ln_ppl", "error"}
HOW_TO_READ = (
    "± is half a 95 % interval; a change is shown where its interval leaves out 0; a dash: it has "
    "none. Perplexities are paired by window; other intervals are combined as of independent runs."
)
SPECS: dict[str, type[Spec]] = {
    "ppl": PerplexitySpec, "compare": CompareSpec, "quantize": QuantizeSpec, "speed": SpeedSpec,
    "footprint": FootprintSpec,
}  # fmt: skip


@dataclass(frozen=True)
class Change:
    """One metric of one matched pair."""

    old: StoredRun
    new: StoredRun
    metric: Metric
    before: Number
    after: Number
    relative: Shift | None
    absolute: Shift

    @property
    def shift(self) -> Shift:
        """As it is shown: a share of the old value where there is one."""
        return self.relative or self.absolute

    def crossed(self, limits: Sequence[Limit]) -> list[Limit]:
        found: list[Limit] = []
        for limit in limits:
            shift = self.relative if limit.is_relative else self.absolute
            if limit.metric is self.metric and shift is not None and limit.crossed(shift):
                found.append(limit)
        return found

    def unchecked(self, limits: Sequence[Limit]) -> list[Limit]:
        """Limits on a share, where the value changed from one that has none."""
        if self.relative is not None or self.absolute.value == 0:
            return []
        return [limit for limit in limits if limit.metric is self.metric and limit.is_relative]


@dataclass(frozen=True)
class Unmatched:
    """A run that is compared with nothing, and why.

    Attributes:
        broke: it succeeded before and no longer does.
        before: the old run that succeeded, where nothing that can be compared with it was measured since.
    """

    run: StoredRun
    why: str
    broke: bool = False
    before: StoredRun | None = None


@dataclass(frozen=True)
class Difference:
    """Every change, the pairs that were compared, old before new, and every run without a partner."""

    changes: tuple[Change, ...]
    pairs: tuple[tuple[StoredRun, StoredRun], ...]
    unmatched: tuple[Unmatched, ...]

    @property
    def surroundings(self) -> list[Surrounding]:
        """Devices, drivers and libraries that differ between the two runs of a pair."""
        return surroundings((old.record, new.record) for old, new in self.pairs)

    @property
    def names(self) -> dict[str, str]:
        """Run id → its model, told apart from others of which the same is said, in titles and rows."""
        records = [new.record for _, new in self.pairs] + [one.run.record for one in self.unmatched]
        return names_apart(records, lambda record: f"{model_of(record)}: {what(record)}")

    @property
    def broken(self) -> list[Unmatched]:
        return [one for one in self.unmatched if one.broke]

    def crossed(self, limits: Sequence[Limit]) -> list[tuple[Change, Limit]]:
        return [(change, limit) for change in self.changes for limit in change.crossed(limits)]

    def unchecked(self, limits: Sequence[Limit]) -> Iterator[tuple[Limit, StoredRun, str]]:
        """Limits on what an old run has and no new one answers to, with one of the two runs, and why.

        Runs that broke are not among them.
        """
        for limit in limits:
            read = limit.metric.read
            for one in self.unmatched:
                if one.before is not None and read(one.before.record) is not None:
                    yield limit, one.run, one.why
            for old, new in self.pairs:
                if read(old.record) is not None and read(new.record) is None:
                    yield limit, new, f"has no {limit.metric.name}, and had it before"
            for change in self.changes:
                if limit in change.unchecked(limits):
                    yield limit, change.new, f"was {change.before.value:g} before, of which there is no share"

    def failures(self, limits: Sequence[Limit]) -> list[str]:
        """Why a build under these limits fails; nothing where all are held, or there are none."""
        if not limits:
            return []
        return [
            *(f"{limit.text} is crossed by {one.new.record.run_id}" for one, limit in self.crossed(limits)),
            *(f"{one.run.record.run_id}: {one.why}" for one in self.broken),
            *(
                f"{limit.text} cannot be checked for {run.record.run_id}: {why}"
                for limit, run, why in self.unchecked(limits)
            ),
        ]


def difference(
    old: Sequence[StoredRun], new: Sequence[StoredRun], sides: Sequence[StoredRun] = ()
) -> Difference:
    """Match and compare; of several runs of one spec in a folder the newest counts.

    Of the old folder that is the newest that succeeded, if one did: what a new run must live up to. Of the
    new one it is the newest, however it ended.

    Args:
        old, new: newest first.
        sides: further runs that a comparison among these may be of.
    """
    known = {run.record.run_id: run.record for run in (*sides, *old, *new)}
    before = _by_key(sorted(old, key=lambda run: run.record.status != "ok"), known)
    after = _by_key(new, known)
    changes: list[Change] = []
    pairs: list[tuple[StoredRun, StoredRun]] = []
    unmatched: list[Unmatched] = []
    for key, run in after.items():
        partner = before.get(key)
        if partner is None:
            unmatched.append(Unmatched(run, "only in the new folder"))
        elif "ok" not in (run.record.status, partner.record.status):
            unmatched.append(Unmatched(run, f"{ENDINGS[run.record.status]}, as before"))
        elif run.record.status != "ok":
            ended = ENDINGS[run.record.status]
            unmatched.append(Unmatched(run, f"{ended}, and had succeeded before", broke=True))
        elif partner.record.status != "ok":
            unmatched.append(Unmatched(run, f"succeeded, and before: {ENDINGS[partner.record.status]}"))
        elif why := _unlike(partner.record, run.record):
            unmatched.append(Unmatched(run, why, before=partner))
        else:
            pairs.append((partner, run))
            changes += _changes(partner, run)
    unmatched += (
        Unmatched(run, "only in the old folder", before=run if run.record.status == "ok" else None)
        for key, run in before.items()
        if key not in after
    )
    return Difference(tuple(changes), tuple(pairs), tuple(unmatched))


def _by_key(runs: Sequence[StoredRun], known: Mapping[str, Record]) -> dict[Hashable, StoredRun]:
    """The first of each key."""
    found: dict[Hashable, StoredRun] = {}
    for run in runs:
        found.setdefault(_key(run.record, known), run)
    return found


def _key(record: Record, known: Mapping[str, Record]) -> Hashable:
    """Equal for runs of one spec; specs of older versions are filled with today's defaults.

    Ids hold the time, so a comparison is that of two specs; of a run that is not `known`, of its id.
    """
    kind = SPECS[record.kind]
    spec = kind.model_validate(record.spec)
    if isinstance(spec, CompareSpec):
        names = spec.baseline, spec.candidate
        return "compare", *(_key(known[name], known) if name in known else name for name in names)
    values: dict[str, Any] = spec.model_dump(mode="json")
    if isinstance(spec, SpeedSpec | FootprintSpec):
        cast("dict[str, Any]", values["serving"]).pop("gpus")
        return record.kind, canonical_json(values), device_of(record)
    return record.kind, canonical_json(values)


def _unlike(old: Record, new: Record) -> str | None:
    """Why two runs of one spec are not to be compared."""
    if old.kind == "ppl" and perplexity_condition(old) != perplexity_condition(new):
        return "another text, tokenizer or number of windows than before"
    return None


def _changes(old: StoredRun, new: StoredRun) -> Iterator[Change]:
    for metric in METRICS.values():
        before, after = metric.read(old.record), metric.read(new.record)
        if before is None or after is None:
            continue
        share = None if metric.signed else relative(before, after)
        if metric.name == "ppl":
            share = paired_perplexity(old, new) or share
        shift = absolute(before, after)
        if metric.name == "ppl" and share is not None:
            ends = (None if end is None else end * before.value for end in (share.low, share.high))
            shift = Shift(shift.value, *ends)
        yield Change(old, new, metric, before, after, share, shift)


def telling(changes: Sequence[Change], limits: Sequence[Limit]) -> list[Change]:
    """What a reader looks at: of pairs of runs in which something changed, that and the main metrics.

    Changed has what crossed a limit, what moved beyond its interval, and a main metric that has none.
    """
    asked = {limit.metric.name for limit in limits}
    found: list[Change] = []
    for pair in by_pair(changes).values():
        moved = [c for c in pair if _tells(c, limits)]
        if moved:
            found += [c for c in pair if c.metric.name in MAIN | asked or c in moved]
    return found


def _tells(change: Change, limits: Sequence[Limit]) -> bool:
    if change.crossed(limits) or change.unchecked(limits) or change.shift.certain:
        return True
    return change.shift.certain is None and change.metric.name in MAIN and change.shift.value != 0


def changes_tables(
    changes: Sequence[Change], limits: Sequence[Limit], names: Mapping[str, str]
) -> list[Table[Change]]:
    """A table for each pair of runs, old, new and change of every metric in its rows; the last says how.

    Args:
        names: of the new runs' models, by run id.
    """
    groups = list(by_pair(changes).values())
    columns = [
        Column[Change]("metric", lambda c: c.metric.name, label=True),
        Column[Change]("old", lambda c: _value(c.before, c.old)),
        Column[Change]("new", lambda c: _value(c.after, c.new)),
        Column[Change]("change", _shift),
        Column[Change]("shown", _verdict),
    ]
    if limits:
        columns.append(Column[Change]("limit", lambda c: _limit(c, limits)))
    return [
        Table(
            f"{names[group[0].new.record.run_id]}: {what(group[0].new.record)}",
            columns,
            group,
            HOW_TO_READ if group is groups[-1] else "",
            lambda c: (c.old.record.run_id, c.new.record.run_id),
        )
        for group in groups
    ]


def by_pair(changes: Sequence[Change]) -> dict[str, list[Change]]:
    found: dict[str, list[Change]] = {}
    for change in changes:
        found.setdefault(change.new.record.run_id, []).append(change)
    return found


def unmatched_table(rows: Sequence[Unmatched], names: Mapping[str, str]) -> Table[Unmatched]:
    """Runs that nothing was compared with.

    Args:
        names: of their models, by run id.
    """
    return Table(
        "Not compared",
        (
            Column[Unmatched]("model", lambda u: names[u.run.record.run_id], label=True),
            Column[Unmatched]("measured", lambda u: what(u.run.record), label=True),
            Column[Unmatched](
                "why", lambda u: Cell(u.why, "failed" if u.broke else "measured"), prose=3, label=True
            ),
            Column[Unmatched]("run", lambda u: u.run.record.run_id, label=True),
        ),
        rows,
    )


def _value(number: Number, run: StoredRun) -> Cell:
    return Cell(plus_minus(number.value, number.low, number.high), "measured", (run.record.run_id,))


def _shift(change: Change) -> Cell:
    shift = change.shift
    scale, unit = (100, " %") if change.relative else (1, "")
    value = scale * shift.value
    if shift.low is None or shift.high is None:
        return Cell(f"{value:+.3g}{unit}", "derived")
    half = scale * (shift.high - shift.low) / 2
    digits = decimals_for(half) if half else 2
    return Cell(f"{value:+.{digits}f} ± {half:.{digits}f}{unit}", "derived")


def _verdict(change: Change) -> Cell:
    shift = change.shift
    if shift.value == 0:
        return Cell("equal")
    if shift.certain is None:
        return NOT_MEASURED
    if not shift.certain:
        return Cell("no")
    better = {"lower": shift.value < 0, "higher": shift.value > 0, None: None}[change.metric.better]
    return Cell("yes" if better is None else "yes, better" if better else "yes, worse")


def _limit(change: Change, limits: Sequence[Limit]) -> Cell:
    if change.crossed(limits):
        return Cell("crossed", "failed")
    if change.unchecked(limits):
        return Cell("unchecked", "failed")
    return Cell("held") if any(limit.metric is change.metric for limit in limits) else NOT_MEASURED
