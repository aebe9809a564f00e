"""What was asked for: a frozen value, complete before anything loads, with a hash of its own.

A spec says what determines the samples. Where results are written and how they look is not part of it.
"""

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from evalsuite.core.protocol import WindowProtocol


class PerplexitySpec(BaseModel):
    """One model scored on one text under one protocol.

    Attributes:
        model: hub id, local folder, GGUF file, or the name of a packaged model (``demo``, ``smollm2``).
        corpus: ``wikitext-2``, ``builtin`` or the path of a text file.
        limit: score only the first this many windows; None scores all.
        tokenizer: where the tokenizer is read when not from the model.
        dtype: ``auto`` is bfloat16 where the device computes in it, else float32.
        device: ``auto`` is the first CUDA device, else the CPU.
        batch_size: windows a forward pass; ``auto`` takes the largest that fits.
        keep_hidden: keep the scored positions' final hidden states, which a divergence needs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["ppl"] = "ppl"
    model: str
    engine: Literal["auto", "torch"] = "auto"
    corpus: str
    protocol: WindowProtocol
    limit: int | None = Field(default=None, ge=1)
    tokenizer: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda:\d+)$")
    batch_size: Literal["auto"] | PositiveInt = "auto"
    trust_remote_code: bool = False
    keep_hidden: bool = False


class CompareSpec(BaseModel):
    """Two finished runs, named by their ids."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["compare"] = "compare"
    baseline: str
    candidate: str


class QuantizeSpec(BaseModel):
    """One checkpoint quantized by one recipe.

    Attributes:
        source: hub id, local folder, GGUF file, or the name of a packaged model.
        recipe: every choice of `evalsuite.quant.recipe.Recipe`, defaults included.
        device: ``auto`` is the first CUDA device, else the CPU.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["quantize"] = "quantize"
    source: str
    recipe: dict[str, str | int | bool]
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda:\d+)$")


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces and no NaN: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def spec_hash(spec: PerplexitySpec | CompareSpec | QuantizeSpec) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of the spec's canonical JSON."""
    return hashlib.sha256(canonical_json(spec.model_dump(mode="json")).encode()).hexdigest()[:12]
