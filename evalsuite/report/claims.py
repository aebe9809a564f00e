"""A published card as data: its claims, and the public facts that they can be held against.

A claim keeps a few quoted words, so that a reader finds it again, and the conditions that the card states for
it. What the card does not say is left out, and stays unknown.
"""

import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, cast

from pydantic import Field, FiniteFloat, PositiveFloat, PositiveInt, ValidationError, model_validator
from pydantic_core import ErrorDetails

from evalsuite.core.errors import UsageError
from evalsuite.core.value import Value
from evalsuite.report.claim_geometry import Geometry, Stored
from evalsuite.report.claim_metrics import FLAG_STATES, METRICS, Metric, listed

QUOTE_LIMIT = 80
APPROXIMATE = 0.15
EXAMPLE = "experiments/claims/qwopus_35b_a3b.toml"


class Conditions(Value):
    """Under what a number was taken, as far as the card says; None is not said.

    Attributes:
        cache: experts of each layer on the GPU, or ``all``.
        mode: eager, or with CUDA graphs.
        text, windows: what a perplexity is over.
        component: which part: of the disk ``hub cache``, ``expert cache`` or ``peak``, of host memory
            ``used``, and of the weights in the card's own words.
        phase: which forward passes.
        hit_rate: share of a token's experts that are on the GPU already.
        argument: of `flag`.
    """

    gpu: str | None = None
    cache: PositiveInt | Literal["all"] | None = None
    policy: str | None = None
    mode: Literal["eager", "graphs"] | None = None
    dtype: str | None = None
    context: PositiveInt | None = None
    concurrency: PositiveInt | None = None
    text: str | None = None
    windows: PositiveInt | None = None
    component: str | None = None
    phase: Literal["decode", "prefill"] | None = None
    hit_rate: float | None = Field(default=None, ge=0, le=1)
    vllm: str | None = None
    flag: str | None = None
    argument: str | float | None = None

    def stated(self) -> dict[str, Any]:
        """The conditions that are said."""
        return {key: value for key in Conditions.model_fields if (value := getattr(self, key)) is not None}


class Claim(Conditions):
    """One number or flag of the card.

    Attributes:
        where: the section of the card.
        quote: a few of its words, at most 80 characters.
        model: a key of the file's models.
        value: the number in `unit`; for the metric ``flag``, one of its states.
        low, high: in place of a value, a range.
        words: what stands where a number should be, such as ``not measured``.
        approximate: the card writes ~ or "about".
        tolerance: relative; None takes the metric's.
        of: of a ratio, the two claims that it divides; sum_of: the claims that it adds up.
        excludes: conditions under which, by the card's own words, this number was not taken.
    """

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    where: str = Field(min_length=1)
    quote: str = Field(min_length=1, max_length=QUOTE_LIMIT)
    model: str
    metric: str
    value: FiniteFloat | str | None = None
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    words: str | None = None
    unit: str = ""
    approximate: bool = False
    tolerance: float | None = Field(default=None, ge=0)
    of: tuple[str, str] | None = None
    sum_of: tuple[str, ...] = ()
    excludes: Conditions = Conditions()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.metric not in METRICS:
            raise ValueError(f"there is no metric {self.metric!r}; there are {listed(METRICS)}")
        metric, given = METRICS[self.metric], (self.value, self.low, self.words)
        if sum(thing is not None for thing in given) != 1 or (self.low is None) != (self.high is None):
            raise ValueError("give one of value, low with high, or words")
        if self.unit not in metric.units and self.metric != "flag" and self.words is None:
            raise ValueError(
                f"{self.metric} has no unit {self.unit!r}: it is given in {listed(metric.units)}"
            )
        if self.metric == "flag":
            if self.flag is None or self.value not in FLAG_STATES:
                raise ValueError(
                    f"a flag claim names its flag, and its value is one of {listed(FLAG_STATES)}"
                )
        elif isinstance(self.value, str):
            raise ValueError(
                f"{self.metric} is a number, not {self.value!r}; what stands in its place goes to words"
            )
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low {self.low:g} is above high {self.high:g}")
        if (self.metric == "ratio") != (self.of is not None):
            raise ValueError("a ratio names the two claims that it divides in of, and nothing else has of")
        return self

    @property
    def kind(self) -> Metric:
        return METRICS[self.metric]

    @property
    def factor(self) -> float:
        return self.kind.units.get(self.unit, 1.0)

    @property
    def number(self) -> float | None:
        """The value in the metric's base unit; of a range its middle; None for flags and words."""
        if self.low is not None and self.high is not None:
            return (self.low + self.high) / 2 * self.factor
        return self.value * self.factor if isinstance(self.value, float) else None

    @property
    def rounding(self) -> float:
        """Half a unit of the last digit that the quotation gives, or else the value, in the base unit."""
        if not isinstance(self.value, float) or self.kind.counts:
            return 0.0
        quoted = (text.replace(",", "") for text in re.findall(r"\d[\d,]*(?:\.\d+)?", self.quote))
        written = next(
            (text for text in quoted if float(text) == self.value), f"{self.value:.10f}".rstrip("0")
        )
        return 0.5 * 10.0 ** -len(written.partition(".")[2]) * self.factor

    @property
    def interval(self) -> tuple[float, float] | None:
        """What the claim allows, tolerance and rounding included, in the base unit."""
        number = self.number
        if number is None:
            return None
        relative = self.kind.tolerance if self.tolerance is None else self.tolerance
        if self.approximate and self.tolerance is None:
            relative = max(relative, APPROXIMATE)
        low = number if self.low is None else self.low * self.factor
        high = number if self.high is None else self.high * self.factor
        slack = self.rounding
        return low - abs(low) * relative - slack, high + abs(high) * relative + slack

    def allows(self, number: float) -> bool:
        bounds = self.interval
        return bounds is not None and bounds[0] <= number <= bounds[1]

    def text_of(self) -> str:
        """As a reader of the card sees it, without its conditions."""
        if self.words is not None:
            return f"“{self.words}”"
        if self.metric == "flag":
            argument = "" if self.argument is None else f" {_plain_number(self.argument).replace(',', '')}"
            return f"{self.flag}{argument}: {self.value}"
        if self.low is not None and self.high is not None:
            figure = f"{_plain_number(self.low)}–{_plain_number(self.high)}"
        else:
            figure = _plain_number(self.value if self.value is not None else math.nan)
        noun = self.kind.noun.removesuffix("s") if self.number == 1 else self.kind.noun
        unit = "×" if self.unit == "x" else f" {self.unit or noun}".rstrip()
        return ("~" if self.approximate else "") + figure + unit


class Subject(Value):
    """A model that the card speaks of.

    Attributes:
        names: as a record may call it: hub ids, folder names.
        fingerprints: of its checkpoints, where known.
        stand_ins: names of checkpoints of the same geometry with dummy weights, for speed and memory.
        stored: how its weights are stored.
        geometry: a key of the file's geometries.
        published: metrics that its publisher states, with the `source` of these.
    """

    title: str
    names: tuple[str, ...] = ()
    fingerprints: tuple[str, ...] = ()
    stand_ins: tuple[str, ...] = ()
    stored: Stored | None = None
    geometry: str | None = None
    published: dict[str, FiniteFloat] = Field(default={})
    source: str | None = None

    @model_validator(mode="after")
    def _sourced(self) -> Self:
        if self.published and not self.source:
            raise ValueError("published numbers need the source that they were read in")
        for name in self.published:
            if name not in METRICS:
                raise ValueError(f"there is no metric {name!r}; there are {listed(METRICS)}")
        return self


class Device(Value):
    """A GPU as its maker describes it: memory, its bandwidth, and that of the link to the host, one way."""

    source: str
    memory_gib: PositiveFloat
    memory_gb_s: PositiveFloat
    link_gb_s: PositiveFloat


class Corpus(Value):
    """A text and the number of tokens that the model's tokenizer makes of it."""

    source: str
    tokens: PositiveInt


class Card(Value):
    title: str
    source: str


class Claims(Value):
    """A claims file. Its own order is the card's."""

    card: Card
    models: dict[str, Subject]
    geometry: dict[str, Geometry] = Field(default={})
    gpus: dict[str, Device] = Field(default={})
    texts: dict[str, Corpus] = Field(default={})
    claim: tuple[Claim, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _references(self) -> Self:
        known: set[str] = set()
        for claim in self.claim:
            if claim.id in known:
                raise ValueError(f"two claims have the id {claim.id!r}")
            known.add(claim.id)
            if claim.model not in self.models:
                raise ValueError(
                    f"{claim.id}: there is no model {claim.model!r}; there are {listed(tuple(self.models))}"
                )
        for claim in self.claim:
            for other in (*(claim.of or ()), *claim.sum_of):
                if other not in known:
                    raise ValueError(f"{claim.id}: there is no claim {other!r}")
                if self.by_id(other).number is None:
                    raise ValueError(f"{claim.id}: {other!r} has no number")
        for key, model in self.models.items():
            if model.geometry is not None and model.geometry not in self.geometry:
                raise ValueError(f"models.{key}: there is no geometry {model.geometry!r}")
        return self

    def by_id(self, claim_id: str) -> Claim:
        return next(claim for claim in self.claim if claim.id == claim_id)

    def shape(self, claim: Claim) -> tuple[Geometry, Stored] | None:
        """Geometry and storage of the claim's model, where both are given."""
        model = self.models[claim.model]
        if model.geometry is None or model.stored is None:
            return None
        return self.geometry[model.geometry], model.stored


def load_claims(path: Path) -> Claims:
    """Read a claims file.

    Raises:
        UsageError: it is not there, is no TOML, or holds something that is no claim; the message names it.
    """
    try:
        data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read.",
            cause=str(error.strerror),
            todo="give the path of a claims file, which counts from the current folder in an experiment file "
            "too; `hlwq-eval check --init CARD.md --out FILE` drafts one.",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML.", cause=str(error)) from error
    try:
        return Claims.model_validate(data)
    except ValidationError as error:
        reasons = [_reason(detail, data) for detail in error.errors()]
        more = f" And {len(reasons) - 5} more." if len(reasons) > 5 else ""
        raise UsageError(
            f"{path.name} is no claims file that can be checked.",
            cause="; ".join(reasons[:5]) + "." + more,
            todo=f"{EXAMPLE} shows every key.",
        ) from error


def _reason(detail: ErrorDetails, data: Mapping[str, Any]) -> str:
    """Where and what, with a claim's id in place of its number."""
    place = list(detail["loc"])
    if len(place) > 1 and place[0] == "claim" and isinstance(place[1], int):
        entry: Any = data["claim"][place[1]]
        name = cast("dict[str, Any]", entry).get("id") if isinstance(entry, dict) else None
        place[:2] = [f"claim {name or place[1] + 1}"]
    what = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        known = Claim if "claim" in str(place[0]) else None
        what = "unknown key" + (f"; a claim may have {', '.join(known.model_fields)}" if known else "")
    return ": ".join((".".join(map(str, place)) or "file", what))


def _plain_number(value: float | str) -> str:
    """12 digits at most, thousands with commas: 295,680 and 6.56."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if value == int(value) else f"{value:.12g}"
