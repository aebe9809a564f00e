"""From a request to a trace file: which experts a model chooses while it reads and writes real text."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from evalsuite.core.errors import UsageError
from evalsuite.core.geometry import Geometry
from evalsuite.core.spec import Dtype
from evalsuite.core.value import Value
from evalsuite.data.corpora import load_corpus, sha256_text
from evalsuite.data.models import Checkpoint, find_checkpoint
from evalsuite.data.prompts import cut_prompts
from evalsuite.data.tokens import tokenise
from evalsuite.engines.routing import RoutedPass, RoutingRecorder
from evalsuite.engines.tokenizer import load_tokenizer
from evalsuite.experts.trace import Trace, TraceFacts
from evalsuite.store.derived import AGAIN
from evalsuite.store.folder import storage_errors

TRACE_FILE, ENGINE_LOG = "trace.parquet", "engine.log"


class TraceRequest(Value):
    """What is traced.

    Attributes:
        model, tokenizer, corpus: as in `evalsuite.core.spec.PerplexitySpec`.
        load_format: ``dummy`` takes random weights, whose routing says nothing about the model.
        device: ``auto``, ``cpu`` or ``cuda:N``; for vLLM, where it was installed for.
        input_len, output_len: tokens of each prompt, and generated greedily after it.
        requests, concurrency: prompts in all, and how many run at once.
        seed: decides which stretches of the text are the prompts.
    """

    model: str
    engine: Literal["torch", "vllm"] = "torch"
    corpus: str
    tokenizer: str | None = None
    dtype: Dtype = "auto"
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda:\d+)$")
    load_format: Literal["auto", "dummy"] = "auto"
    input_len: PositiveInt = 512
    output_len: int = Field(default=128, ge=2)
    requests: PositiveInt = 8
    concurrency: PositiveInt = 1
    seed: int = 0
    trust_remote_code: bool = False


class TraceProgress(Protocol):
    """Where a trace in the making is shown."""

    def phase(self, text: str) -> None: ...

    def traced(self, done: int, total: int) -> None:
        """Requests whose tokens are recorded."""
        ...


def run_trace(request: TraceRequest, folder: Path, progress: TraceProgress, *, replace: bool) -> Path:
    """Trace and write ``trace.parquet`` into `folder`, where it appears once it is whole.

    Raises:
        UsageError: the model has no experts, the prompts do not fit, or there is a trace already and
            `replace` is false; all of it before a weight is read.
        ModelError: there is no such model, or it has no config.json that is known here.
        StorageError: the folder cannot be written.
    """
    out = folder / TRACE_FILE
    if out.exists() and not replace:
        raise UsageError(f"{out} exists.", todo="choose another folder, or give --fresh to replace it.")
    if request.requests % request.concurrency:
        raise UsageError(
            f"{request.requests} requests cannot be sent {request.concurrency} at a time, none left over.",
            todo="give --requests that is a multiple of --concurrency.",
        )
    progress.phase("reading the configuration")
    checkpoint = find_checkpoint(request.model, weights=False)
    geometry = expert_geometry(checkpoint)
    _check_context(checkpoint.name, geometry, request)
    progress.phase("reading the text")
    corpus = load_corpus(request.corpus)
    if request.load_format == "auto":
        progress.phase("finding the model")
        checkpoint = find_checkpoint(request.model)
    tokenizer = load_tokenizer(request.tokenizer, checkpoint)
    text = corpus.text("blank-line")
    prompts = cut_prompts(
        tokenise(tokenizer.tokenizer, text, "never"), request.input_len, request.requests, request.seed
    )
    with storage_errors(folder, AGAIN):
        folder.mkdir(parents=True, exist_ok=True)
    progress.phase(f"loading {checkpoint.name}")
    recorder = open_recorder(request, checkpoint, folder / ENGINE_LOG)
    try:
        passes = _record(recorder, prompts, request, progress)
        facts = TraceFacts(
            model=checkpoint.name,
            fingerprint=checkpoint.fingerprint(),
            corpus=corpus.name,
            corpus_sha256=sha256_text(text),
            prompts_sha256=hashlib.sha256(np.stack(prompts).astype("<i8").tobytes()).hexdigest(),
            tokenizer=tokenizer.name,
            tokenizer_sha256=tokenizer.sha256,
            geometry=geometry,
            layers=recorder.layers,
            engine=recorder.name,
            computed=recorder.computed,
            dummy=request.load_format == "dummy",
            input_len=request.input_len,
            output_len=request.output_len,
            concurrency=request.concurrency,
        )
    finally:
        recorder.close()
    with storage_errors(out, AGAIN):
        trace_of(facts, passes).save(out)
    return out


def expert_geometry(checkpoint: Checkpoint) -> Geometry:
    """Sizes of a mixture of experts, from its configuration.

    Raises:
        UsageError: it is dense: there is nothing to cache.
        ModelError: its configuration is not known here.
    """
    from evalsuite.engines.geometry import read_geometry  # transformers takes seconds to import

    geometry = read_geometry(checkpoint, _stored_dtype(checkpoint))
    if not geometry.experts:
        raise UsageError(
            f"{checkpoint.name} is dense: it has no routed experts, so there is nothing to cache.",
            todo="give a mixture-of-experts model.",
        )
    return geometry


def trace_of(facts: TraceFacts, passes: Sequence[RoutedPass]) -> Trace:
    """The passes in their order, each of them a step."""
    sizes = [len(one.request) for one in passes]
    chosen = np.concatenate([one.chosen for one in passes])
    return Trace(
        facts,
        request=np.concatenate([one.request for one in passes]).astype(np.uint32),
        position=np.concatenate([one.position for one in passes]).astype(np.uint32),
        step=np.repeat(np.arange(len(passes)), sizes).astype(np.uint32),
        prefill=np.repeat([one.prefill for one in passes], sizes),
        chosen=chosen.astype(np.uint8) if facts.geometry.experts <= 256 else chosen.astype(np.uint16),
    )


def open_recorder(request: TraceRequest, checkpoint: Checkpoint, log: Path) -> RoutingRecorder:
    """Load the model in the engine that was asked for.

    Args:
        log: for what an engine in a process of its own prints.

    Raises:
        UsageError: that engine cannot trace this request.
    """
    if request.engine == "vllm":
        from evalsuite.engines.vllm_routing import VllmRouting

        return VllmRouting(
            checkpoint,
            dtype=request.dtype,
            load_format=request.load_format,
            tokens=request.input_len + request.output_len,
            concurrency=request.concurrency,
            trust_remote_code=request.trust_remote_code,
            log=log,
        )
    if request.load_format == "dummy":
        raise UsageError(
            "The torch engine traces real weights only.",
            todo="give --engine vllm with --load-format dummy, or leave it out.",
        )
    from evalsuite.engines.torch_routing import TorchRouting  # torch takes seconds to import

    return TorchRouting(
        checkpoint,
        device=request.device,
        dtype=request.dtype,
        trust_remote_code=request.trust_remote_code,
    )


def _record(
    recorder: RoutingRecorder,
    prompts: Sequence[NDArray[np.int64]],
    request: TraceRequest,
    progress: TraceProgress,
) -> list[RoutedPass]:
    passes: list[RoutedPass] = []
    for first in range(0, len(prompts), request.concurrency):
        together = prompts[first : first + request.concurrency]
        passes += recorder.record(together, request.output_len, first)
        progress.traced(first + len(together), len(prompts))
    return passes


def _check_context(name: str, geometry: Geometry, request: TraceRequest) -> None:
    longest, needed = geometry.context, request.input_len + request.output_len
    if longest is not None and needed > longest:
        raise UsageError(
            f"{name} has a context of {longest:,} tokens, and {request.input_len:,} in and "
            f"{request.output_len:,} out make {needed:,}.",
            todo="give a smaller --input-len or --output-len.",
        )


def _stored_dtype(checkpoint: Checkpoint) -> str:
    config = checkpoint.config()
    text = config.get("text_config") or {}
    return text.get("dtype") or config.get("dtype") or config.get("torch_dtype") or "bfloat16"
