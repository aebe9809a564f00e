"""Limits on changes, as `--fail-on` takes them.

::

    limit  = metric ( ">" | "<" ) change
    change = ( "+" | "-" ) number [ "%" ]        or 0

``ppl>+1%`` is crossed where perplexity rose by more than 1 %, ``decode_tok_s<-5%`` where decode speed fell by
more than 5 %; without ``%`` the change is in the metric's own unit, as in ``vram_gb>+0.5``. A metric that
may be of either sign, such as ``delta_ln_ppl``, has no share: its limit is without ``%``.

A limit is crossed only where the whole 95 % interval of the change lies beyond it, and by the value alone
where a change has no interval. So noise fails no build, and a build that passes may still hide a change
smaller than the interval: more repeats or more windows make it narrower. A limit on what was measured before
and is no longer there fails one.
"""

import re
from dataclasses import dataclass
from typing import Literal

from evalsuite.core.errors import UsageError
from evalsuite.report.changes import METRICS, Metric, Shift

EXAMPLES = "'ppl>+1%' or 'decode_tok_s<-5%'"
_LIMIT = re.compile(r"\s*([a-z0-9_]+)\s*([<>])\s*([+\-−]?)\s*(\d+(?:\.\d+)?)\s*(%?)\s*")


@dataclass(frozen=True)
class Limit:
    """A change of `metric` beyond `bound` is too much; a share of the old value where it `is_relative`."""

    text: str
    metric: Metric
    direction: Literal["<", ">"]
    bound: float
    is_relative: bool

    def crossed(self, shift: Shift) -> bool:
        if self.direction == ">":
            return (shift.value if shift.low is None else shift.low) > self.bound
        return (shift.value if shift.high is None else shift.high) < self.bound


def parse_limit(text: str) -> Limit:
    """A limit from its text.

    Raises:
        UsageError: it is none, its metric is not known, it does not say whether it is up or down, or it is a
            share of a metric that may be negative.
    """
    found = _LIMIT.fullmatch(text)
    if found is None:
        raise UsageError(
            f"--fail-on {text!r} is no limit.",
            cause="it is a metric, < or >, a sign, a number, and % where it is a share of the old value.",
            todo=f"write something like {EXAMPLES}.",
        )
    name, direction, sign, number, percent = found.groups()
    if name not in METRICS:
        raise UsageError(
            f"--fail-on {text!r}: there is no metric {name!r}.", todo=f"choose from {', '.join(METRICS)}."
        )
    if percent and METRICS[name].signed:
        raise UsageError(
            f"--fail-on {text!r}: there is no share of {name}.",
            cause=f"{METRICS[name].meaning} may be negative or next to 0.",
            todo=f"limit its change itself, such as {name}{direction}{'+' if direction == '>' else '-'}0.01.",
        )
    if not sign and float(number):
        likely = "+" if direction == ">" else "-"
        raise UsageError(
            f"--fail-on {text!r} does not say whether {number}{percent} is a rise or a fall.",
            cause="a limit is on the change, not on the value.",
            todo=f"write {name}{direction}{likely}{number}{percent}.",
        )
    bound = float(number) * (1 if sign in ("+", "") else -1) / (100 if percent else 1)
    return Limit(text, METRICS[name], ">" if direction == ">" else "<", bound, bool(percent))
