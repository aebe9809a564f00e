"""What was measured: one immutable record a run, with everything needed to judge and repeat it.

Schema history (a reader refuses a version it does not know):

1. first version: kinds ``ppl``, ``compare`` and ``quantize``.
2. adds the kinds ``speed`` and ``footprint``, sampled telemetry, expert-cache counters and the workers of a
   cluster. Records of version 1 are valid as they stand.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from evalsuite.core.cache import CacheCounters
from evalsuite.core.errors import OutOfMemory, TimedOut
from evalsuite.core.protocol import WindowProtocol
from evalsuite.core.speed import FootprintResult, SpeedResult
from evalsuite.core.telemetry import Telemetry
from evalsuite.core.value import Value

SCHEMA_VERSION = 2
READABLE_VERSIONS = (1, 2)

Status = Literal["running", "ok", "failed", "oom", "timeout", "interrupted"]


def status_of(error: BaseException) -> Status:
    """How a run ended that this error ended."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, TimedOut):
        return "timeout"
    return "oom" if isinstance(error, OutOfMemory) else "failed"


BETWEEN_GPUS = ("NCCL_", "TORCH_NCCL_", "TORCH_SYMM_MEM_", "VLLM_ALLREDUCE_", "VLLM_NCCL_")


class Gpu(Value):
    """A device as its driver names it."""

    name: str
    memory_bytes: int


class Machine(Value):
    """What ran it.

    Attributes:
        packages: versions of the libraries that can change a number.
        environment: variables that the user has set and those libraries read; no names, keys or paths.
    """

    platform: str
    cpu: str
    cpu_cores: int
    ram_bytes: int
    gpus: tuple[Gpu, ...] = ()
    gpu_driver: str | None = None
    cuda: str | None = None
    python: str
    packages: dict[str, str]
    environment: dict[str, str] = Field(default={})
    git_commit: str | None = None
    git_dirty: bool | None = None

    def variables(self, devices: int) -> dict[str, str]:
        """Those of `environment` that a run on so many devices can feel; one sends nothing to another."""
        return {
            name: value
            for name, value in self.environment.items()
            if devices > 1 or not name.startswith(BETWEEN_GPUS)
        }


class Worker(Value):
    """One of several that shared a run on a cluster.

    Attributes:
        name: ``worker 3 on node 2``, numbered as they came; it holds no address.
        machine: of its node, with all of its GPUs.
        device_name: what it computed on.
        windows: that it scored and that count.
        load_s: seconds until it was ready.
    """

    name: str
    machine: Machine
    device_name: str
    windows: int
    load_s: float


class ModelFacts(Value):
    """The checkpoint as it was loaded.

    Attributes:
        fingerprint: SHA-256 over the configuration and the weight files' names, sizes, headers and samples.
        stored: how the weights lie on disk, such as ``BF16 safetensors`` or ``GGUF Q4_1``.
        stored_bytes: size of the weight files.
        computed: the arithmetic, such as ``bfloat16 on cpu``.
        warnings: what a reader of the number must know about these weights.
    """

    name: str
    architecture: str
    parameters: int
    vocabulary: int
    max_context: int | None
    fingerprint: str
    stored: str
    stored_bytes: int
    computed: str
    dtype: str
    device: str
    device_name: str
    engaged: dict[str, Any] = Field(default={})
    warnings: tuple[str, ...] = ()


class TextFacts(Value):
    """The scored text and how it was cut into tokens."""

    corpus: str
    source: str
    sha256: str
    utf8_bytes: int
    tokens: int
    tokenizer: str
    tokenizer_sha256: str


class Prefix(Value):
    """Perplexity of windows `start` to `stop` (exclusive) with its 95 % interval, where one can be had."""

    start: int
    stop: int
    scored_tokens: int
    perplexity: float
    low: float | None
    high: float | None


class PerplexityResult(Value):
    """Sums over the scored windows, and what follows from them by one division each.

    Attributes:
        windows, windows_available: scored, and in the whole text under the protocol.
        nats: Σ −ln p over the scored tokens.
        perplexity: exp(nats / scored_tokens); low and high bound its 95 % interval.
        bits_per_byte: nats / ln 2 / scored UTF-8 bytes.
        word_perplexity: exp(nats / scored words), words cut at white space as lm-evaluation-harness does;
            None where the text has next to no white space.
        prefixes, segments: the first 200, 500, 1,000, all windows; and the windows between those marks.
        scoring_s: time of the forward passes, load excluded, of the windows scored in this process.
    """

    kind: Literal["ppl"] = "ppl"
    windows: int
    windows_available: int
    scored_tokens: int
    scored_bytes: int
    scored_words: int
    nats: float
    perplexity: float
    low: float | None
    high: float | None
    bits_per_byte: float
    word_perplexity: float | None
    prefixes: tuple[Prefix, ...]
    segments: tuple[Prefix, ...]
    batch_size: int
    load_s: float
    scoring_s: float
    scored_tokens_per_s: float
    forward_tokens_per_s: float
    resumed_from_window: int


class Divergence(Value):
    """Kullback–Leibler divergence of the candidate from the baseline over the scored tokens, in nats."""

    tokens: int
    mean: float
    median: float
    p99: float
    top1_agreement: float
    top1_agreement_low: float | None
    top1_agreement_high: float | None


class CompareResult(Value):
    """A candidate against a baseline, paired by window.

    Attributes:
        delta_ln_ppl: ln PPL(candidate) − ln PPL(baseline), with its 95 % interval and p-value.
        divergence: None where either run kept no hidden states; `divergence_absent` says why.
    """

    kind: Literal["compare"] = "compare"
    baseline_run: str
    candidate_run: str
    windows: int
    scored_tokens: int
    baseline_perplexity: float
    candidate_perplexity: float
    delta_ln_ppl: float
    low: float | None
    high: float | None
    p_value: float | None
    divergence: Divergence | None
    divergence_absent: str | None = None


class QuantizedPart(Value):
    """Sums over one weight matrix, over the experts of a layer for one projection, or over a class or layer.

    Attributes:
        name: the module, with ``*`` for an expert's number, or what is summed.
        layer: number of the decoder layer, or None outside of them.
        layer_class: as in the quantizer's rule table, such as ``experts``.
        fate: ``quantized``; or unchanged, ``kept`` by the rules or ``unfit`` for the group.
        reason: why it is unchanged.
        matrices, weights: how many matrices, and how many numbers in them.
        squared_error, squared_weight: Σ(w − ŵ)² and Σw², over quantized weights only, else 0.
        outliers: weights beyond six times the root mean square of their matrix.
        bytes_before, bytes_after: as stored.
    """

    name: str
    layer: int | None
    layer_class: str
    fate: Literal["quantized", "kept", "unfit"]
    reason: str
    matrices: int
    weights: int
    squared_error: float
    squared_weight: float
    outliers: int
    bytes_before: int
    bytes_after: int

    @property
    def relative_error(self) -> float | None:
        """‖W − Ŵ‖ / ‖W‖; None where nothing was quantized, or where all weights are 0."""
        return math.sqrt(self.squared_error / self.squared_weight) if self.squared_weight else None

    @property
    def sqnr_db(self) -> float | None:
        """10·log₁₀(Σw² / Σ(w − ŵ)²); None where nothing was quantized, or nothing was lost."""
        error = self.relative_error
        return -20 * math.log10(error) if error else None

    @property
    def outlier_share(self) -> float | None:
        return self.outliers / self.weights if self.fate == "quantized" else None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes_after / self.weights

    @property
    def compression_ratio(self) -> float:
        return self.bytes_before / self.bytes_after


class QuantizeResult(Value):
    """A quantized checkpoint against its source: sums, and what follows from them by one division each.

    Attributes:
        source, destination: names of the two checkpoints.
        source_fingerprint, fingerprint: of the source as it was given, and of what was written.
        total: all quantized weights.
        classes: a row for each class and fate; layers: for each quantized class in each layer.
        unfit: tensors that the rules would quantize, and whose shape did not allow it.
        bits_per_weight: of the quantized weights as they are stored, scales, norms and shapes included.
        code_bits_per_weight: the same of the codes, where the decoded weights are what is stored.
        compression_ratio: bytes_before / bytes_after of the whole checkpoint.
        quantize_s, bytes_read: of this process; shards that an earlier one finished are in neither.
    """

    kind: Literal["quantize"] = "quantize"
    source: str
    source_fingerprint: str
    destination: str
    fingerprint: str
    total: QuantizedPart
    classes: tuple[QuantizedPart, ...]
    layers: tuple[QuantizedPart, ...]
    unfit: tuple[QuantizedPart, ...]
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    code_bits_per_weight: float
    compression_ratio: float
    device: str
    quantize_s: float
    bytes_read: int
    bytes_per_s: float


class Record(Value):
    """One run. Numbers carry their unit in their name; times are UTC, ISO 8601.

    Attributes:
        workers: of a run on a cluster, whose `machine` is that of the first one; else empty.
        beside: how many other GPUs of its machine the same sweep measured meanwhile.
    """

    schema_version: Literal[1, 2] = SCHEMA_VERSION
    run_id: str
    kind: Literal["ppl", "compare", "quantize", "speed", "footprint"]
    status: Status
    started: str
    finished: str
    spec: dict[str, Any]
    spec_hash: str
    protocol: WindowProtocol | None = None
    machine: Machine
    workers: tuple[Worker, ...] = ()
    beside: int = 0
    model: ModelFacts | None = None
    text: TextFacts | None = None
    results: (
        Annotated[
            PerplexityResult | CompareResult | QuantizeResult | SpeedResult | FootprintResult,
            Field(discriminator="kind"),
        ]
        | None
    ) = None
    expert_cache: CacheCounters | None = None
    telemetry: Telemetry | None = None
    engaged: dict[str, Any] = Field(default={})
    warnings: tuple[str, ...] = ()
    error: str | None = None
    files: tuple[str, ...] = ()
