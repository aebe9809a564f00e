"""A model and the prompts for it: everything about a speed run that is known before anything loads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalsuite.core.errors import UsageError
from evalsuite.core.record import TextFacts
from evalsuite.core.spec import Serving, Workload
from evalsuite.data.corpora import Corpus, sha256_text
from evalsuite.data.models import DEMO, Checkpoint, find_checkpoint
from evalsuite.data.prompts import cut_prompts
from evalsuite.data.tokens import TokenStream, tokenise
from evalsuite.engines.tokenizer import LoadedTokenizer, load_tokenizer

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts")
BOS = "never"


@dataclass(frozen=True)
class Subject:
    """A model with the text that its prompts are cut from.

    Attributes:
        fingerprint: of the checkpoint.
        warnings: what a reader of its numbers must know about the prompts.
    """

    checkpoint: Checkpoint
    fingerprint: str
    text: TextFacts
    stream: TokenStream
    warnings: tuple[str, ...]

    def prompts(self, workload: Workload) -> list[list[NDArray[np.int64]]]:
        """The prompts of every round, warm-ups first; the same for every cell of this workload.

        Raises:
            UsageError: the text is too short for so many.
        """
        each, rounds = workload.concurrency, workload.warmups + workload.repeats
        flat = cut_prompts(self.stream, workload.input_len, each * rounds, workload.seed)
        return [flat[start : start + each] for start in range(0, len(flat), each)]


def prepare(model: str, serving: Serving, workload: Workload, corpus: Corpus) -> Subject:
    """Find a model, read its configuration and cut the text into its tokens.

    Raises:
        UsageError: the model, its tokenizer or its context do not allow the request.
    """
    checkpoint = find_checkpoint(model, weights=serving.load_format != "dummy")
    _check_context(checkpoint, serving, workload)
    tokenizer, warnings = _tokenizer(checkpoint, serving, workload)
    text = corpus.text("blank-line")
    stream = tokenise(tokenizer.tokenizer, text, BOS)
    facts = TextFacts(
        corpus=corpus.name, source=corpus.source, sha256=sha256_text(text),
        utf8_bytes=int(stream.bytes.sum()), tokens=len(stream), tokenizer=tokenizer.name,
        tokenizer_sha256=tokenizer.sha256,
    )  # fmt: skip
    return Subject(checkpoint, checkpoint.fingerprint(), facts, stream, warnings)


def check_cache_sizes(checkpoint: Checkpoint, sizes: Sequence[int | None]) -> list[str]:
    """Notes on sizes that are allowed and unwise.

    Raises:
        UsageError: the model has no experts, or fewer than a size asks for.
    """
    given = sorted(size for size in sizes if size is not None)
    if not given:
        return []
    experts = config_value(checkpoint, *EXPERTS)
    top_k = config_value(checkpoint, *TOP_K)
    if experts is None:
        raise UsageError(
            f"{checkpoint.name} has no experts, so there is nothing for an expert cache to hold.",
            todo="leave --cache-sizes out.",
        )
    if given[-1] > experts:
        raise UsageError(
            f"A cache of {given[-1]} experts was asked for, and {checkpoint.name} has {experts} in a layer.",
            cause="more slots than experts would stay empty.",
            todo="write all for every expert on the device, or give a smaller size.",
        )
    return [
        f"a cache of {size} holds less than the {top_k} experts that one token takes: every step overflows "
        "and is served in groups"
        for size in given
        if top_k is not None and size < top_k
    ]


def config_value(checkpoint: Checkpoint, *names: str) -> int | None:
    """The first of these that config.json has, in its text part or outside of it."""
    config = checkpoint.config()
    parts: list[dict[str, Any]] = [config.get("text_config") or {}, config]
    return next((int(part[name]) for part in parts for name in names if part.get(name)), None)


def _check_context(checkpoint: Checkpoint, serving: Serving, workload: Workload) -> None:
    whole = workload.input_len + workload.output_len
    longest = config_value(checkpoint, "max_position_embeddings")
    for limit, whose in (
        (longest, f"{checkpoint.name} has a context of"),
        (serving.max_model_len, "--max-model-len is"),
    ):
        if limit is not None and whole > limit:
            raise UsageError(
                f"A prompt of {workload.input_len:,} and an output of {workload.output_len:,} are "
                f"{whole:,} tokens, and {whose} {limit:,}.",
                todo="give a smaller --input-len or --output-len.",
            )


def _tokenizer(
    checkpoint: Checkpoint, serving: Serving, workload: Workload
) -> tuple[LoadedTokenizer, tuple[str, ...]]:
    own = checkpoint.gguf is not None or any(checkpoint.folder.glob("tokenizer*.json"))
    if workload.tokenizer is None and serving.load_format == "dummy" and not own:
        tokenizer = load_tokenizer(DEMO, None)
        warnings = (
            "prompts are tokens of the built-in byte-level tokenizer: the model's own is not here, and dummy "
            "weights make nothing of either",
        )
    else:
        tokenizer, warnings = load_tokenizer(workload.tokenizer, checkpoint), ()
    vocabulary = config_value(checkpoint, "vocab_size")
    if vocabulary is not None and tokenizer.vocabulary > vocabulary:
        raise UsageError(
            f"The tokenizer {tokenizer.name} has {tokenizer.vocabulary:,} tokens and {checkpoint.name} knows "
            f"{vocabulary:,}.",
            cause="it belongs to another model.",
            todo="give the model's own tokenizer, or leave --tokenizer out.",
        )
    return tokenizer, warnings
