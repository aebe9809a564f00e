"""What was asked for: a frozen value, complete before anything loads, with a hash of its own.

A spec says what determines the samples. Where results are written and how they look is not part of it.
"""

import hashlib
import json
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PositiveInt

from evalsuite.core.protocol import WindowProtocol
from evalsuite.core.value import Value

Engine = Literal["auto", "torch", "vllm", "server"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
CachePolicy = Literal["lru", "lfu", "fifo", "slru", "lfru"]
CacheStore = Literal["pinned", "disk"]
MOST_SKEWED = 8.0  # one expert then has all but 0.4 % of the tokens


def known_routing(name: str) -> str:
    """A routing as specs have it: ``model``, ``uniform_random``, or ``zipf:S`` with an exponent S above 0.

    Raises:
        ValueError: it is none of these.
    """
    if name in ("model", "uniform_random"):
        return name
    law, _, exponent = name.partition(":")
    with suppress(ValueError):
        if law == "zipf" and 0 < float(exponent) <= MOST_SKEWED:
            return f"zipf:{float(exponent):g}"
    raise ValueError(f"{name!r} is not one of model, uniform_random and zipf:S, such as zipf:1")


Routing = Annotated[str, AfterValidator(known_routing)]

# fields that came later: at their default they leave a spec's hash as it was
LATER: Any = {"later": True}


class Serving(Value):
    """How a model is loaded and served, spelled as vLLM spells it where vLLM has the flag.

    Attributes:
        engine: ``auto`` picks by what is installed and fits, and the record names what it picked.
        gpus: indices of the GPUs to use; empty leaves it to the engine (the first ones, or the CPU).
        tensor_parallel_size: GPUs that share one copy of the model.
        load_format: ``dummy`` takes random weights in the geometry of config.json: speed and memory only.
        enforce_eager: no CUDA graphs and no compilation.
        moe_expert_cache_size: experts of each layer on the device; None keeps all of them there.
        moe_expert_cache_policy, moe_expert_store: which experts stay, and where the others are.
        moe_routing: ``uniform_random`` and ``zipf:S`` draw each token's experts instead of asking the router,
            for dummy weights, whose routers often send every token to the same experts; what comes out is no
            text. Zipf's law takes different experts with probabilities ∝ rank^−S, in each layer alike.
        max_model_len, max_num_seqs, max_num_batched_tokens, gpu_memory_utilization: None leaves them to the
            engine.
        additional_config: handed to vLLM as it is.
        server_url: measure a server that runs already, instead of starting one.
    """

    engine: Engine = "auto"
    dtype: Dtype = "auto"
    gpus: tuple[int, ...] = ()
    tensor_parallel_size: PositiveInt = 1
    load_format: Literal["auto", "dummy"] = "auto"
    enforce_eager: bool = False
    moe_expert_cache_size: int | None = Field(default=None, ge=1)
    moe_expert_cache_policy: CachePolicy = "lru"
    moe_expert_store: CacheStore = "pinned"
    moe_routing: Routing = "model"
    max_model_len: PositiveInt | None = None
    max_num_seqs: PositiveInt | None = None
    max_num_batched_tokens: PositiveInt | None = None
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    additional_config: dict[str, Any] = Field(default={})
    server_url: str | None = None
    trust_remote_code: bool = False


class PerplexitySpec(Value):
    """One model scored on one text under one protocol.

    Attributes:
        model: hub id, local folder, GGUF file, or the name of a packaged model (``demo``, ``smollm2``).
        corpus: ``wikitext-2``, ``builtin`` or the path of a text file.
        limit: score only the first this many windows; None scores all.
        tokenizer: where the tokenizer is read when not from the model.
        dtype: ``auto`` is bfloat16 where the device computes in it, else float32; in vLLM the weights' own.
        device: ``auto`` is the first CUDA device, else the CPU.
        batch_size: windows a forward pass; ``auto`` takes the largest that fits.
        keep_hidden: keep the scored positions' final hidden states, which a divergence needs.
        tensor_parallel_size, moe_*, gpu_memory_utilization, additional_config, server_url: as in `Serving`.
    """

    kind: Literal["ppl"] = "ppl"
    model: str
    engine: Engine = "auto"
    corpus: str
    protocol: WindowProtocol
    limit: int | None = Field(default=None, ge=1)
    tokenizer: str | None = None
    dtype: Dtype = "auto"
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda:\d+)$")
    batch_size: Literal["auto"] | PositiveInt = "auto"
    trust_remote_code: bool = False
    keep_hidden: bool = False
    tensor_parallel_size: PositiveInt = Field(default=1, json_schema_extra=LATER)
    moe_expert_cache_size: int | None = Field(default=None, ge=1, json_schema_extra=LATER)
    moe_expert_cache_policy: CachePolicy = Field(default="lru", json_schema_extra=LATER)
    moe_expert_store: CacheStore = Field(default="pinned", json_schema_extra=LATER)
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1, json_schema_extra=LATER)
    additional_config: dict[str, Any] = Field(default={}, json_schema_extra=LATER)
    server_url: str | None = Field(default=None, json_schema_extra=LATER)


class CompareSpec(Value):
    """Two finished runs, named by their ids."""

    kind: Literal["compare"] = "compare"
    baseline: str
    candidate: str


class QuantizeSpec(Value):
    """One checkpoint quantized by one recipe.

    Attributes:
        source: hub id, local folder, GGUF file, or the name of a packaged model.
        recipe: every choice of `evalsuite.quant.recipe.Recipe`, defaults included.
        device: ``auto`` is the first CUDA device, else the CPU.
    """

    kind: Literal["quantize"] = "quantize"
    source: str
    recipe: dict[str, str | int | bool]
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda:\d+)$")


class Workload(Value):
    """What is asked of a served model.

    Attributes:
        input_len, output_len: tokens of every prompt, and tokens generated greedily after it, whatever the
            model's end-of-sequence token says.
        concurrency: requests that are sent at once.
        repeats, warmups: counted and uncounted rounds; every round has prompts of its own.
        seed: decides the prompts; the same in every cell, so that their tokens can be compared.
        corpus, tokenizer: where the prompts' text comes from, as for `PerplexitySpec`.
        timeout_s: of one cell, loading excluded.
    """

    corpus: str
    tokenizer: str | None = None
    input_len: PositiveInt = 512
    output_len: int = Field(default=128, ge=2)
    concurrency: PositiveInt = 1
    repeats: PositiveInt = 5
    warmups: int = Field(default=1, ge=0)
    seed: int = 0
    timeout_s: float = Field(default=1800.0, gt=0)


class SpeedSpec(Value):
    """One cell of a sweep: a model, served one way, under one workload."""

    kind: Literal["speed"] = "speed"
    model: str
    serving: Serving = Serving()
    workload: Workload


class FootprintSpec(Value):
    """Memory and disk of a model served one way, through load, idle, prefill and decode.

    Attributes:
        idle_s: how long it is watched at rest after loading.
    """

    kind: Literal["footprint"] = "footprint"
    model: str
    serving: Serving = Serving()
    workload: Workload
    idle_s: float = Field(default=2.0, ge=0)


Spec = PerplexitySpec | CompareSpec | QuantizeSpec | SpeedSpec | FootprintSpec


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces and no NaN: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def spec_hash(spec: Spec) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of the spec's canonical JSON."""
    fields = type(spec).model_fields
    unset = {
        name
        for name, field in fields.items()
        if field.json_schema_extra == LATER and getattr(spec, name) == field.default
    }
    return hashlib.sha256(canonical_json(spec.model_dump(mode="json", exclude=unset)).encode()).hexdigest()[
        :12
    ]
