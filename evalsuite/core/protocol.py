"""A perplexity protocol: every choice between a text and the tokens that are scored.

Two perplexities of one model on one text differ by tens of percent when only these choices differ, so a
protocol is a value that travels with the number. Sources of the presets:

- ``hf``: the sliding-window loop of https://huggingface.co/docs/transformers/perplexity
- ``gptq``: the evaluation of Frantar et al., https://arxiv.org/abs/2210.17323 (disjoint windows of 2048)
- ``llama.cpp``: ``llama-perplexity``, https://github.com/ggml-org/llama.cpp/tree/master/tools/perplexity
- ``card-1155``: the arithmetic fit to a card that states 1,155 windows and 295,680 tokens and nothing else
- ``paper``: 2048-token windows every 512 tokens, the last 512 of each scored, full windows only
"""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from evalsuite.core.errors import UsageError


class WindowProtocol(BaseModel):
    """How a text becomes windows and scored tokens; every choice is explicit.

    Attributes:
        name: preset it came from, with ``*`` appended once a choice was overridden.
        join: how the rows of a corpus become one text: ``blank-line`` puts ``"\\n\\n"`` between rows
            (the Hugging Face habit), ``raw`` restores the text of the original file.
        context: tokens in a window.
        stride: tokens between the starts of two windows.
        scored: which tokens of a window count: the last ``stride`` of them, or the ``second-half``
            (positions context/2 + 1 and later, as llama.cpp does).
        first_window: the first window is scored ``like-others``, or ``whole`` from its second token on.
        tail: a last window shorter than ``context`` is ``drop``-ped or kept ``short``.
        bos: the tokenizer's beginning-of-sequence token, if it adds one: ``never``, once before the ``text``,
            or in place of the first token of ``each-window``.
        averaging: nats are summed over all scored tokens and divided once. The rival convention, the mean of
            window means, is never reported.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    join: Literal["blank-line", "raw"] = "blank-line"
    context: int = Field(ge=2)
    stride: int = Field(ge=1)
    scored: Literal["stride", "second-half"] = "stride"
    first_window: Literal["like-others", "whole"] = "like-others"
    tail: Literal["drop", "short"] = "drop"
    bos: Literal["never", "text", "each-window"] = "never"
    averaging: Literal["token"] = "token"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.stride > self.context:
            raise ValueError(
                f"stride {self.stride} is larger than context {self.context}: tokens would be skipped"
            )
        if self.scored == "second-half" and (self.tail, self.first_window) != ("drop", "like-others"):
            raise ValueError("second-half scoring is defined for full windows only")
        if self.scored == "second-half" and not self.disjoint:
            raise ValueError(
                "second-half scoring is defined for disjoint windows: others would score tokens twice"
            )
        if self.scored == "second-half" and self.context < 3:
            raise ValueError("second-half scoring needs a context of at least 3 tokens")
        if self.tail == "short" and self.first_window == "like-others":
            raise ValueError(
                "a short tail needs a first window scored whole: a short text would score nothing"
            )
        return self

    @property
    def disjoint(self) -> bool:
        return self.stride == self.context

    def override(self, context: int | None = None, stride: int | None = None) -> "WindowProtocol":
        """The same protocol with another context or stride; disjoint windows stay disjoint.

        Raises:
            UsageError: the stride is larger than the context, or either is too small.
        """
        if context is None and stride is None:
            return self
        context = self.context if context is None else context
        if stride is None:
            stride = context if self.disjoint else self.stride
        changes = {"context": context, "stride": stride}
        if all(getattr(self, key) == value for key, value in changes.items()):
            return self
        try:
            return WindowProtocol.model_validate(
                self.model_dump() | changes | {"name": self.name.rstrip("*") + "*"}
            )
        except ValidationError as error:
            raise UsageError(
                f"--context {context} --stride {stride} is no usable protocol.",
                cause="; ".join(_reason(detail) for detail in error.errors()) + ".",
                todo="choose a context of at least 2 tokens and a stride between 1 and the context.",
            ) from error

    def describe(self) -> str:
        """One line for captions: the numbers that decide the result."""
        first = "" if self.first_window == "like-others" else ", first window whole"
        count = f"last {self.stride}" if self.scored == "stride" else "second half"
        return f"{self.name}: context {self.context}, stride {self.stride}, {count} scored{first}"


def _reason(detail: ErrorDetails) -> str:
    where = f"{detail['loc'][0]}: " if detail["loc"] else ""
    return where + detail["msg"].removeprefix("Value error, ")


PROTOCOLS: dict[str, WindowProtocol] = {
    p.name: p
    for p in (
        WindowProtocol(name="card-1155", context=1536, stride=256),
        WindowProtocol(name="hf", context=2048, stride=512, first_window="whole", tail="short", bos="text"),
        WindowProtocol(name="gptq", context=2048, stride=2048),
        WindowProtocol(
            name="llama.cpp", join="raw", context=512, stride=512, scored="second-half", bos="each-window"
        ),
        WindowProtocol(name="paper", context=2048, stride=512),
    )
}


def protocol(name: str) -> WindowProtocol:
    """The preset called `name`.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in PROTOCOLS:
        raise UsageError(f"No protocol is called {name!r}.", todo=f"choose one of {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[name]
