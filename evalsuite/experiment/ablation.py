"""An ablation: several ways to quantize one model, side by side.

A baseline and some arms, each scored on the same windows and compared with the baseline, paired by window.
Where the file names several protocols or both engines, every arm is scored in every such setting, and the
engines are compared arm by arm.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from evalsuite.core.protocol import WindowProtocol, protocol
from evalsuite.core.spec import Dtype
from evalsuite.core.value import Value
from evalsuite.experiment.quantized import RecipeTable, slug_of
from evalsuite.run.options import CARD_PROTOCOL, Checks

Engine = Literal["auto", "torch", "vllm"]


class Arm(Value):
    """One row of the table; without a recipe it is the baseline."""

    name: str = Field(min_length=1)
    recipe: RecipeTable | None = None


@dataclass(frozen=True)
class Setting:
    """How an arm is scored."""

    protocol: WindowProtocol
    engine: Engine

    def __str__(self) -> str:
        return f"{self.protocol.name}, {self.engine}"


class Ablation(Value):
    """An experiment file of arms.

    Attributes:
        question: what the table answers; its title.
        source: as MODEL on the command line.
        corpus, context, stride, limit, dtype, device: as for `hlwq-eval ppl`.
        protocol, engine: as for `hlwq-eval ppl`, or a list of several.
        gpu_memory_utilization: of vLLM, as for `hlwq-eval ppl`.
        keep: keep the quantized checkpoints in the work folder.
        arms: the first is the baseline.
    """

    question: str
    source: str
    corpus: str
    protocol: Annotated[tuple[str, ...], *Checks, Field(min_length=1)] = (CARD_PROTOCOL,)
    engine: Annotated[tuple[Engine, ...], *Checks, Field(min_length=1)] = ("auto",)
    context: int | None = None
    stride: int | None = None
    limit: int | None = Field(default=None, ge=1)
    dtype: Dtype = "auto"
    device: str = "auto"
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    keep: bool = False
    arms: tuple[Arm, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if [arm.recipe is None for arm in self.arms] != [i == 0 for i in range(len(self.arms))]:
            raise ValueError("the first arm is the baseline and has no recipe; every other arm has one")
        names = [slug_of(arm.name) for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError("two arms have the same name")
        if "auto" in self.engine and len(self.engine) > 1:
            raise ValueError("auto would be one of the other engines: name torch and vllm")
        if self.gpu_memory_utilization is not None and "vllm" not in self.engine:
            raise ValueError("gpu_memory_utilization is vLLM's: name vllm as an engine, or leave it out")
        return self

    @property
    def protocols(self) -> tuple[WindowProtocol, ...]:
        return tuple(protocol(name).override(self.context, self.stride) for name in self.protocol)

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Every protocol through every engine, protocol by protocol."""
        return tuple(Setting(windows, engine) for windows in self.protocols for engine in self.engine)
