"""From a spec to a finished run: the one place that knows every layer below it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evalsuite.core.cache import ALL_RESIDENT, CacheCounters
from evalsuite.core.errors import NotEngaged, StorageError, UsageError
from evalsuite.core.protocol import WindowProtocol
from evalsuite.core.record import Machine, ModelFacts, Record, Status, TextFacts, status_of
from evalsuite.core.spec import CompareSpec, PerplexitySpec, spec_hash
from evalsuite.core.units import si_bytes
from evalsuite.data.corpora import Corpus, load_corpus, sha256_text
from evalsuite.data.models import Checkpoint, find_checkpoint
from evalsuite.data.tokens import TokenStream, tokenise
from evalsuite.data.windows import Window, count_windows, plan_windows
from evalsuite.engines.base import Scorer
from evalsuite.engines.scorers import ScorerChoice, check_scorer, choose_scorer, open_scorer
from evalsuite.engines.tokenizer import LoadedTokenizer, load_tokenizer
from evalsuite.measure.divergence import compare, require_comparable
from evalsuite.measure.perplexity import Progress, score_windows, summarise
from evalsuite.run.record import new_record
from evalsuite.store.folder import RunFolder
from evalsuite.store.runs import ResumeMode, RunStore, load_record, load_windows
from evalsuite.store.runs import StoredRun as Finished
from evalsuite.telemetry.probes import free_disk_bytes

DEMO_WARNING = "the built-in model: a small mixture of experts that shows how the suite works"
HIDDEN_AND_HEAD = ("hidden.npy", "head.safetensors")


@dataclass(frozen=True)
class Text:
    """A corpus under a protocol and a tokenizer: everything about a run but the model's weights."""

    facts: TextFacts
    stream: TokenStream
    windows: list[Window]
    available: int


def prepare_text(corpus: Corpus, tokenizer: LoadedTokenizer, spec: PerplexitySpec) -> Text:
    """Tokenise and cut.

    Raises:
        UsageError: the text is shorter than one window.
    """
    text = corpus.text(spec.protocol.join)
    stream = tokenise(tokenizer.tokenizer, text, spec.protocol.bos)
    facts = TextFacts(
        corpus=corpus.name,
        source=corpus.source,
        sha256=sha256_text(text),
        utf8_bytes=int(stream.bytes.sum()),
        tokens=len(stream),
        tokenizer=tokenizer.name,
        tokenizer_sha256=tokenizer.sha256,
    )
    windows = plan_windows(len(stream), spec.protocol, spec.limit)
    return Text(facts, stream, windows, count_windows(len(stream), spec.protocol))


@dataclass(frozen=True)
class Request:
    """What a run needs before the model loads."""

    checkpoint: Checkpoint
    tokenizer: LoadedTokenizer
    text: Text

    def identity(self, spec: PerplexitySpec) -> dict[str, Any]:
        """What the samples depend on besides the engine."""
        return {
            "spec": spec.model_dump(mode="json"),
            "weights": self.checkpoint.fingerprint(),
            "text": self.text.facts.sha256,
            "tokenizer": self.tokenizer.sha256,
            "scored_tokens": sum(w.scored for w in self.text.windows),
        }

    def check_loaded(self, facts: ModelFacts, spec: PerplexitySpec) -> None:
        """Refuse a model that turns out not to fit the protocol or the tokenizer.

        Raises:
            UsageError: its context or its vocabulary is too small.
        """
        _check_context(self.checkpoint.name, facts.max_context, spec.protocol)
        _check_vocabulary(self.tokenizer, facts.vocabulary, self.checkpoint.name)


def prepare_request(spec: PerplexitySpec, root: Path, progress: Progress) -> Request:
    """Find everything, and refuse what cannot be done; no weight is read.

    Args:
        root: of the results, which must have room.

    Raises:
        UsageError, ModelError, CorpusError, StorageError: the request makes no sense on this machine.
    """
    progress.phase("reading the text")
    corpus = load_corpus(spec.corpus)
    check_scorer(spec)
    progress.phase("finding the model")
    checkpoint = find_checkpoint(spec.model)
    _check_context(checkpoint.name, _config_value(checkpoint, "max_position_embeddings"), spec.protocol)
    tokenizer = load_tokenizer(spec.tokenizer, checkpoint)
    _check_vocabulary(tokenizer, _config_value(checkpoint, "vocab_size"), checkpoint.name)
    progress.phase("cutting the text into windows")
    text = prepare_text(corpus, tokenizer, spec)
    _check_disk(spec, checkpoint, text, root)
    return Request(checkpoint, tokenizer, text)


def run_perplexity(
    spec: PerplexitySpec, store: RunStore, progress: Progress, mode: ResumeMode = "auto"
) -> Finished:
    """Score a model on a text, resuming an unfinished run of the same spec.

    Whatever ends it early leaves a folder that the same call resumes; the reason is in its record.

    Raises:
        EvalError: see core/errors.py; nothing loads before the request is known to make sense.
    """
    request = prepare_request(spec, store.root, progress)
    checkpoint, text = request.checkpoint, request.text
    choice = choose_scorer(spec, checkpoint)
    identity = request.identity(spec) | choice.identity
    folder = store.begin(spec.kind, checkpoint.slug, spec_hash(spec), identity, mode)
    scorer: Scorer | None = None
    try:
        progress.phase(f"loading {checkpoint.name}")
        scorer = open_scorer(choice, spec, checkpoint)
        request.check_loaded(scorer.facts, spec)
        batch = None if spec.batch_size == "auto" else spec.batch_size
        scoring = score_windows(scorer, text.stream, text.windows, folder, batch, progress)
        if spec.keep_hidden:
            scorer.save_head(folder.path / "head.safetensors")
        results = summarise(
            folder.rows.frame(), available=text.available, load_s=scorer.load_s, scoring=scoring
        )
        memory = scorer.memory()
        record = perplexity_record(folder, spec, "ok", choice, scorer.facts, text)
        warnings = (*record.warnings, *scoring.warnings, *memory.warnings())
        record = record.model_copy(update={"results": results, "telemetry": memory, "warnings": warnings})
        if spec.moe_expert_cache_size is not None and scoring.forward_tokens:
            record = with_expert_cache(record, scorer.expert_cache())
        return Finished(folder.finish(record), record)
    except BaseException as error:
        facts = scorer.facts if scorer else None
        record = perplexity_record(folder, spec, status_of(error), choice, facts, text)
        folder.leave_unfinished(record, error)
        raise
    finally:
        if scorer is not None:
            scorer.close()


def with_expert_cache(record: Record, counters: CacheCounters | None) -> Record:
    """The record of a run that asked for an expert cache.

    Raises:
        NotEngaged: nothing went through it.
    """
    if counters is None and record.engaged.get("experts") == ALL_RESIDENT:
        return record
    if counters is None or counters.hits + counters.misses == 0:
        raise NotEngaged(
            "An expert cache was asked for, and its counters stayed at zero.",
            cause="the engine did not send the model's experts through it.",
            todo="give another engine; if this is the torch engine, it is a fault: please report it with the "
            "model's config.json.",
        )
    shown = {
        "slots": counters.size, "experts": counters.experts, "policy": counters.policy,
        "store": counters.store, "hits": counters.hits, "misses": counters.misses,
        "overflow_steps": counters.overflow_steps,
    }  # fmt: skip
    engaged = record.engaged | {"expert_cache": shown}
    return record.model_copy(update={"expert_cache": counters, "engaged": engaged})


def run_compare(
    baseline: Path, candidate: Path, store: RunStore, progress: Progress, device: str = "auto"
) -> Finished:
    """Compare two finished perplexity runs and keep the result beside the candidate's.

    Raises:
        NotComparable: they differ in text, tokenizer, protocol or windows.
    """
    records = load_record(baseline), load_record(candidate)
    require_comparable(*records)
    divergence, absent = None, _no_divergence((baseline, candidate), records)
    if absent is None:
        progress.phase("recomputing both sets of logits")
        from evalsuite.engines.torch import divergences

        divergence = divergences(baseline, candidate, device)
    frames = load_windows(baseline), load_windows(candidate)
    result = compare(*records, frames, divergence, absent)
    spec = CompareSpec(baseline=records[0].run_id, candidate=records[1].run_id)
    folder = store.begin(
        spec.kind, candidate.parent.name, spec_hash(spec), {"spec": spec.model_dump()}, "fresh"
    )
    record = new_record(folder, spec, "ok").model_copy(
        update={
            "protocol": records[0].protocol,
            "model": records[1].model,
            "text": records[1].text,
            "results": result,
        }
    )
    return Finished(folder.finish(record), record)


def _no_divergence(folders: tuple[Path, Path], records: tuple[Record, Record]) -> str | None:
    sizes = [record.model.vocabulary if record.model else 0 for record in records]
    if sizes[0] != sizes[1]:
        return f"the models have {sizes[0]:,} and {sizes[1]:,} logits a token"
    for folder in folders:
        if missing := [name for name in HIDDEN_AND_HEAD if not (folder / name).is_file()]:
            return f"{folder.name} kept no {missing[0]}; score it with --keep-hidden"
    return None


def perplexity_record(
    folder: RunFolder,
    spec: PerplexitySpec,
    status: Status,
    choice: ScorerChoice,
    facts: ModelFacts | None,
    text: Text,
    machine: Machine | None = None,
) -> Record:
    """The record of a run that ends now, without its results.

    Args:
        facts: of the model; None where it was not loaded.
        machine: as for `new_record`.
    """
    warnings = facts.warnings if facts else ()
    if spec.model == "demo":
        warnings = (DEMO_WARNING, *warnings)
    return new_record(folder, spec, status, machine).model_copy(
        update={
            "protocol": spec.protocol,
            "model": facts,
            "text": text.facts,
            "engaged": {"engine": choice.engine, "engine_why": choice.why} | (facts.engaged if facts else {}),
            "warnings": warnings,
            "files": tuple(
                name for name in ("windows.parquet", *(HIDDEN_AND_HEAD if spec.keep_hidden else ()))
            ),
        }
    )


def _config_value(checkpoint: Checkpoint, key: str) -> int | None:
    config = checkpoint.config()
    return (config.get("text_config") or {}).get(key) or config.get(key)


def _check_context(model: str, longest: int | None, protocol: WindowProtocol) -> None:
    if longest is not None and protocol.context > longest:
        raise UsageError(
            f"{model} has a context of {longest:,} tokens, and the protocol asks for {protocol.context:,}.",
            todo=f"give --context {longest} or less; the result is then another protocol's.",
        )


def _check_vocabulary(tokenizer: LoadedTokenizer, vocabulary: int | None, model: str) -> None:
    if vocabulary is not None and tokenizer.vocabulary > vocabulary:
        raise UsageError(
            f"The tokenizer {tokenizer.name} has {tokenizer.vocabulary:,} tokens and {model} knows "
            f"{vocabulary:,}.",
            cause="it belongs to another model.",
            todo="give the model's own tokenizer, or leave --tokenizer out.",
        )


def _check_disk(spec: PerplexitySpec, checkpoint: Checkpoint, text: Text, root: Path) -> None:
    if not spec.keep_hidden:
        return
    width, vocabulary = _config_value(checkpoint, "hidden_size"), _config_value(checkpoint, "vocab_size")
    if width is None or vocabulary is None:
        return
    needed = 2 * width * (sum(w.scored for w in text.windows) + vocabulary)
    free = free_disk_bytes(root)
    if needed > free:
        raise StorageError(
            f"The hidden states and the head need {si_bytes(needed)}, and {root} has {si_bytes(free)} free.",
            todo="make room, choose another --results folder, or compare without a divergence.",
        )
