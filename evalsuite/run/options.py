"""What a command, or a step of an experiment file, may ask for, and the specs that follow from it.

A field is named as the command line's option is, and what is left out is decided here, so that a file and a
command that say the same thing make equal specs.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeInt, PositiveInt, ValidationError

from evalsuite.core.errors import UsageError
from evalsuite.core.protocol import protocol
from evalsuite.core.spec import (
    CachePolicy,
    CacheStore,
    Dtype,
    Engine,
    FootprintSpec,
    PerplexitySpec,
    Routing,
    Serving,
    Workload,
)
from evalsuite.core.sweep import Axes, Mode
from evalsuite.core.value import Value
from evalsuite.data.models import DEMO

CARD_PROTOCOL = "card-1155"
CARD_WINDOWS = 1155
ALL = "all"

Options = TypeVar("Options", bound=Value)


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _different(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("a value is there twice")
    return values


# one value is a list of one
Checks = (BeforeValidator(_listed), AfterValidator(_different))
Sizes = Annotated[tuple[PositiveInt | Literal["all"], ...], *Checks, Field(min_length=1)]
Counts = Annotated[tuple[PositiveInt, ...], *Checks, Field(min_length=1)]
Modes = Annotated[tuple[Mode, ...], *Checks, Field(min_length=1)]
Gpus = Annotated[tuple[NonNegativeInt, ...], *Checks]
Names = Annotated[tuple[str, ...], *Checks]


class CacheOptions(Value):
    """The expert cache of one run."""

    moe_expert_cache_size: int | None = Field(default=None, ge=1)
    moe_expert_cache_policy: CachePolicy = "lru"
    moe_expert_store: CacheStore = "pinned"


class PerplexityOptions(CacheOptions):
    """Of `hlwq-eval ppl`."""

    engine: Engine = "auto"
    protocol: str = CARD_PROTOCOL
    context: int | None = None
    stride: int | None = None
    limit: PositiveInt | None = None
    corpus: str | None = None
    tokenizer: str | None = None
    dtype: Dtype = "auto"
    batch_size: Literal["auto"] | PositiveInt = "auto"
    gpus: Gpus = ()
    tensor_parallel_size: PositiveInt = 1
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    additional_config: dict[str, Any] = Field(default={})
    keep_hidden: bool = False
    trust_remote_code: bool = False

    @property
    def chose_protocol(self) -> bool:
        return (self.protocol, self.context, self.stride) != (CARD_PROTOCOL, None, None)

    def spec(self, model: str, *others: str | None) -> PerplexitySpec:
        """Of one model; with `others` to compare it with, hidden states are kept.

        Raises:
            UsageError: there is no such protocol, or several GPUs are named.
        """
        corpus = self.corpus or default_corpus(model, *others)
        return PerplexitySpec(
            model=model,
            engine=self.engine,
            corpus=corpus,
            protocol=protocol(self.protocol).override(self.context, self.stride),
            limit=self._limit(corpus),
            tokenizer=self.tokenizer,
            dtype=self.dtype,
            device=one_device(
                self.gpus, "perplexity runs on one device, or on several by --tensor-parallel-size."
            ),
            batch_size=self.batch_size,
            trust_remote_code=self.trust_remote_code,
            keep_hidden=self.keep_hidden or any(others),
            tensor_parallel_size=self.tensor_parallel_size,
            gpu_memory_utilization=self.gpu_memory_utilization,
            additional_config=self.additional_config,
            moe_expert_cache_size=self.moe_expert_cache_size,
            moe_expert_cache_policy=self.moe_expert_cache_policy,
            moe_expert_store=self.moe_expert_store,
        )

    def _limit(self, corpus: str) -> int | None:
        """The built-in text is longer than the card's: by default as many windows as the card has."""
        if corpus == "builtin" and self.limit is None and not self.chose_protocol:
            return CARD_WINDOWS
        return self.limit


@dataclass(frozen=True)
class Sweep:
    """What `speed` measures.

    Attributes:
        any_mode: the modes among the axes were not asked for, and give way to what the engine has.
    """

    axes: Axes
    serving: Serving
    workload: Workload
    any_mode: bool


class SpeedOptions(Value):
    """Of `hlwq-eval speed`."""

    cache_sizes: Sizes = (ALL,)
    modes: Modes | None = None
    gpus: Gpus | None = None
    tensor_parallel_size: Counts = (1,)
    concurrency: Counts = (1,)
    input_len: PositiveInt | None = None
    output_len: int | None = Field(default=None, ge=2)
    repeats: PositiveInt = 5
    warmup: int = Field(default=1, ge=0)
    timeout: float = Field(default=1800.0, ge=1)
    engine: Engine = "auto"
    dtype: Dtype = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    moe_expert_cache_policy: CachePolicy = "lru"
    moe_expert_store: CacheStore = "pinned"
    moe_routing: Routing = "model"
    max_model_len: PositiveInt | None = None
    max_num_seqs: PositiveInt | None = None
    max_num_batched_tokens: PositiveInt | None = None
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    additional_config: dict[str, Any] = Field(default={})
    server_url: str | None = None
    corpus: str | None = None
    tokenizer: str | None = None
    seed: int = 0
    trust_remote_code: bool = False

    def sweep(self, models: Sequence[str], gpu_count: int) -> Sweep:
        """The axes, and what all cells share.

        Args:
            models: the candidate first, then baselines.
            gpu_count: GPUs that can be used here; they decide what is measured where nothing is said.

        Raises:
            UsageError: a mode is asked of a server that runs already.
        """
        on_gpu = bool(gpu_count) and self.server_url is None
        return Sweep(
            Axes(
                models=tuple(models),
                cache_sizes=tuple(map(slots_of, _all_last(self.cache_sizes))),
                modes=self._modes(on_gpu),
                gpus=self._gpus(on_gpu, gpu_count),
                tensor_parallel_sizes=self.tensor_parallel_size,
                concurrencies=self.concurrency,
            ),
            _serving(self, axes={"gpus", "tensor_parallel_size"}),
            Workload(
                corpus=self.corpus or prompt_corpus(self.load_format, *models),
                tokenizer=self.tokenizer, input_len=self.input_len or (512 if gpu_count else 64),
                output_len=self.output_len or (128 if gpu_count else 32), repeats=self.repeats,
                warmups=self.warmup, seed=self.seed, timeout_s=self.timeout,
            ),
            any_mode=self.modes is None,
        )  # fmt: skip

    def _modes(self, on_gpu: bool) -> tuple[Mode, ...]:
        if self.server_url is not None:
            if self.modes is not None:
                raise UsageError(
                    "--modes cannot be chosen for a server that runs already.", todo="leave --modes out."
                )
            return ("graphs",)
        if self.modes is None:
            return ("eager", "graphs") if on_gpu else ("eager",)
        return self.modes

    def _gpus(self, on_gpu: bool, gpu_count: int) -> tuple[int, ...]:
        if self.gpus is not None:
            return self.gpus
        return tuple(range(min(gpu_count, max(self.tensor_parallel_size)))) if on_gpu else ()


class FootprintOptions(CacheOptions):
    """Of `hlwq-eval footprint`."""

    engine: Engine = "auto"
    input_len: PositiveInt = 512
    output_len: int = Field(default=128, ge=2)
    concurrency: PositiveInt = 1
    idle: float = Field(default=2.0, ge=0)
    dtype: Dtype = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    enforce_eager: bool = False
    gpus: Gpus = ()
    tensor_parallel_size: PositiveInt = 1
    moe_routing: Routing = "model"
    max_model_len: PositiveInt | None = None
    max_num_seqs: PositiveInt | None = None
    max_num_batched_tokens: PositiveInt | None = None
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    corpus: str | None = None
    tokenizer: str | None = None
    timeout: float = Field(default=1800.0, ge=1)
    trust_remote_code: bool = False

    def spec(self, model: str) -> FootprintSpec:
        """Raises UsageError where not as many GPUs are named as share the model."""
        if self.gpus and len(self.gpus) != self.tensor_parallel_size:
            raise UsageError(
                f"--gpus names {len(self.gpus)} GPUs and --tensor-parallel-size is "
                f"{self.tensor_parallel_size}.",
                todo="name as many GPUs as share the model.",
            )
        workload = Workload(
            corpus=self.corpus or prompt_corpus(self.load_format, model), tokenizer=self.tokenizer,
            input_len=self.input_len, output_len=self.output_len, concurrency=self.concurrency, repeats=1,
            warmups=0, timeout_s=self.timeout,
        )  # fmt: skip
        return FootprintSpec(model=model, serving=_serving(self), workload=workload, idle_s=self.idle)


def asked(kind: type[Options], values: Mapping[str, Any]) -> Options:
    """Options that a command line gave.

    Raises:
        UsageError: one of them is out of range.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        flag = "--" + str(first["loc"][0]).replace("_", "-")
        raise UsageError(
            f"{flag}: {first['msg'].removeprefix('Value error, ')}.", todo=f"see {flag} in --help."
        ) from error


def default_corpus(model: str | None, *others: str | None) -> str:
    """The built-in text where the built-in model takes part, which no model stands for, else WikiText-2."""
    return "builtin" if DEMO in (model or DEMO, *others) else "wikitext-2"


def prompt_corpus(load_format: str, *models: str) -> str:
    """As `default_corpus`; and dummy weights, which make nothing of any text, take the built-in one."""
    return "builtin" if load_format == "dummy" else default_corpus(*models)


def one_device(gpus: Sequence[int], cause: str) -> str:
    """The device of what runs on a single one: ``cuda:N``, or ``auto`` where no GPU is named.

    Args:
        cause: why it takes one.
    """
    if not gpus:
        return "auto"
    if len(gpus) > 1:
        raise UsageError(
            f"--gpus {','.join(map(str, gpus))} is not the index of one GPU.",
            cause=cause,
            todo="give one index, such as --gpus 0.",
        )
    return f"cuda:{gpus[0]}"


def _serving(options: SpeedOptions | FootprintOptions, axes: Set[str] = frozenset()) -> Serving:
    """What options say of how a model is served, by the names that both have.

    Args:
        axes: of a sweep; each of its cells has its own.
    """
    shared = Serving.model_fields.keys() & type(options).model_fields.keys()
    return Serving(**options.model_dump(include=shared - axes))


def _all_last(sizes: Sequence[int | str]) -> list[int | str]:
    return sorted(sizes, key=lambda size: size == ALL)


def slots_of(size: int | str) -> int | None:
    """Slots of an expert cache; None is all experts."""
    return size if isinstance(size, int) else None
