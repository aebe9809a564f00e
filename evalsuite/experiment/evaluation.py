"""An evaluation: a candidate, a baseline if there is one, and steps, each of which is a command of its own.

A step has the keys of its command's options, and means what the command means: the same words give the same
spec, so what a command measured before is found by the file, and the other way round.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from evalsuite.core.errors import UsageError
from evalsuite.core.value import Value
from evalsuite.experiment.quantized import RecipeTable, slug_of
from evalsuite.report.claim_verdicts import VERDICTS
from evalsuite.report.writers import FORMATS
from evalsuite.run.cache_options import SimulationOptions, TraceOptions
from evalsuite.run.options import (
    FootprintOptions,
    Gpus,
    Names,
    PerplexityOptions,
    SpeedOptions,
    one_device,
    prompt_corpus,
)

Role = Literal["candidate", "baseline"]
ROLES: tuple[Role, ...] = ("candidate", "baseline")


class Named(Value):
    """What every step has.

    Attributes:
        name: for `--only` and for tables; the command where it is left out.
    """

    name: str | None = Field(default=None, min_length=1)


class OfModels(Named):
    """A step that measures models.

    Attributes:
        models: of the two that the file names; both where it is left out.
    """

    models: tuple[Role, ...] = Field(default=ROLES, min_length=1)


class QuantizeStep(Named):
    """The baseline into the candidate."""

    command: Literal["quantize"]
    recipe: RecipeTable
    gpus: Gpus = ()

    @property
    def device(self) -> str:
        return one_device(self.gpus, "a quantization runs on one device.")


class PerplexityStep(PerplexityOptions, OfModels):
    """Each model on the text; of both, a comparison paired by window."""

    command: Literal["ppl"]


class SpeedStep(SpeedOptions, OfModels):
    """A sweep of the candidate; the baseline is measured as well, without an expert cache."""

    command: Literal["speed"]


class FootprintStep(FootprintOptions, OfModels):
    """Each model through load, idle, prefill and decode."""

    command: Literal["footprint"]


class CacheStep(SimulationOptions, TraceOptions, Named):
    """A trace of the candidate, and what caches of several sizes would do with it."""

    command: Literal["cache"]


class CheckStep(Named):
    """The claims of a card against all records of the folder.

    Attributes:
        fail_on: verdicts that make the step a failed one.
    """

    command: Literal["check"]
    claims: str
    fail_on: Names = ()

    @field_validator("fail_on")
    @classmethod
    def _verdicts(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return _known(names, VERDICTS)


class CardStep(Named):
    """A model card of the candidate, beside its records.

    Attributes:
        license, base_model: for the front matter.
    """

    command: Literal["card"]
    license: str | None = None
    base_model: str | None = None


class ReportStep(Named):
    """Tables, pictures and pages of all records of the folder.

    Attributes:
        formats: as for `hlwq-eval report`; all of them where it is left out.
        claims: a claims file to hold against the records.
    """

    command: Literal["report"]
    formats: Names = FORMATS
    claims: str | None = None

    @field_validator("formats")
    @classmethod
    def _formats(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return _known(names, FORMATS)


FromRecords = CheckStep | CardStep | ReportStep
OnText = PerplexityStep | SpeedStep | FootprintStep | CacheStep
Step = (
    QuantizeStep | PerplexityStep | SpeedStep | FootprintStep | CacheStep | CheckStep | CardStep | ReportStep
)


class Geometries(Value):
    """Folders with a config.json, which plans take sizes from where a model is not here yet."""

    candidate: str | None = None
    baseline: str | None = None


class Evaluation(Value):
    """An experiment file of steps.

    Attributes:
        question: what it answers; the title of its tables.
        candidate: as MODEL on the command line; None where a step quantizes the baseline into it.
        baseline: what the candidate is compared with, or None.
        corpus: of every step that names none; None is the built-in text where the built-in model takes part,
            else WikiText-2.
        steps: done in this order.
    """

    question: str
    candidate: str | None = None
    baseline: str | None = None
    corpus: str | None = None
    geometry: Geometries = Geometries()
    steps: tuple[Annotated[Step, Field(discriminator="command")], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.candidate is None) != (self.quantization is not None):
            raise ValueError("either it names a candidate, or its first step quantizes the baseline into one")
        if self.quantization is not None and self.baseline is None:
            raise ValueError("there is no baseline to quantize")
        if any(step.command == "quantize" for step in self.steps[1:]):
            raise ValueError("only the first step can quantize; several recipes are an ablation")
        names = [name_of(step) for step in self.steps]
        if len({slug_of(name) for name in names}) < len(names):
            raise ValueError("two steps have the same name")
        for step in self.steps:
            if isinstance(step, OfModels) and step.models == ("baseline",) and self.baseline is None:
                raise ValueError(f"{name_of(step)} is of the baseline, and there is none")
        return self

    @property
    def quantization(self) -> QuantizeStep | None:
        first = self.steps[0]
        return first if isinstance(first, QuantizeStep) else None

    def roles(self, step: OfModels) -> tuple[Role, ...]:
        """The models that a step is of, the candidate first."""
        there = ROLES if self.baseline is not None else ROLES[:1]
        return tuple(role for role in there if role in step.models)

    def chosen(self, only: Sequence[str]) -> list[Step]:
        """The steps of these names or commands, in the order of the file; all of them where none is given.

        Raises:
            UsageError: a name is no step's.
        """
        known = {word for step in self.steps for word in (name_of(step), step.command)}
        if unknown := [word for word in only if word not in known]:
            raise UsageError(
                f"--only {unknown[0]}: the file has no such step.",
                todo=f"choose from {', '.join(name_of(step) for step in self.steps)}.",
            )
        return [
            self._with_corpus(step)
            for step in self.steps
            if not only or {name_of(step), step.command} & set(only)
        ]

    def _with_corpus(self, step: Step) -> Step:
        """The same text for all steps, also where only one of the models takes part."""
        if not isinstance(step, OnText) or step.corpus is not None:
            return step
        load_format = "auto" if isinstance(step, PerplexityStep) else step.load_format
        chosen = prompt_corpus(load_format, *self._models)
        return step.model_copy(update={"corpus": self.corpus or chosen})

    @property
    def _models(self) -> tuple[str, ...]:
        return tuple(model for model in (self.candidate, self.baseline) if model is not None)

    def limited(self, windows: int) -> "Evaluation":
        """The same, with at most so many windows in every perplexity step."""
        steps = tuple(
            step.model_copy(update={"limit": min(windows, step.limit or windows)})
            if isinstance(step, PerplexityStep)
            else step
            for step in self.steps
        )
        return self.model_copy(update={"steps": steps})


def _known(names: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no {unknown[0]!r}; choose from {', '.join(known)}")
    return tuple(names)


def name_of(step: Step) -> str:
    return step.name or step.command
