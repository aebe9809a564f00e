"""The front matter of a model card: a ``model-index`` whose every value was measured, with its protocol.

The hub takes results of one task, text, configuration and split for one measurement, and keeps the arguments
of the first; therefore a configuration's name holds the protocol, the number of windows, the text's hash,
engine and arithmetic, or the serving and the machine, and of a comparison its baseline. Where runs still
share one, what varies between them is appended.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from evalsuite.core.record import CompareResult, PerplexityResult, Record
from evalsuite.core.spec import SpeedSpec
from evalsuite.core.speed import SpeedResult
from evalsuite.core.sweep import label
from evalsuite.report.apart import words_apart
from evalsuite.report.choose import device_of, engine_of
from evalsuite.report.commands import KINDS
from evalsuite.report.perplexity_runs import protocol_name

TASK, TASK_NAME = "text-generation", "Text Generation"
TEXTS = {"wikitext-2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")}


def card_data(
    name: str, records: Sequence[Record], *, licence: str | None, base_model: str | None
) -> ModelCardData:
    """Metadata of a card.

    Args:
        records: of this model alone, one for each thing that was measured.
        licence: as the hub spells it; None leaves it out.
        base_model: a hub id; None leaves it out.
    """
    models = [record.model for record in records if record.model]
    packed = any("compressed-tensors" in f"{m.stored} {m.engaged.get('quantization')}" for m in models)
    in_order = sorted(records, key=lambda record: KINDS.index(record.kind))
    results = list(eval_results(in_order))
    return ModelCardData(
        model_name=name,
        license=licence,
        base_model=base_model,
        pipeline_tag=TASK,
        tags=["hlwq-eval", *["compressed-tensors"] * packed],
        eval_results=results or None,
    )


def eval_results(records: Sequence[Record]) -> Iterator[EvalResult]:
    """What runs of one model measured, as the hub has it; nothing of a run that failed."""
    by_id = {record.run_id: record for record in records}
    done = [r for r in records if r.status == "ok" and r.kind in ("ppl", "compare", "speed")]
    configurations = {record.run_id: _configuration(record, by_id) for record in done}
    words = words_apart(done, lambda record: configurations[record.run_id])
    for record in done:
        configuration = ", ".join((configurations[record.run_id], *words[record.run_id]))
        if isinstance(record.results, PerplexityResult):
            yield from _perplexity(record, record.results, configuration)
        elif isinstance(record.results, CompareResult):
            yield from _comparison(record, record.results, configuration)
        elif isinstance(record.results, SpeedResult):
            yield from _speed(record, record.results, configuration)


def _configuration(record: Record, by_id: Mapping[str, Record]) -> str:
    """The name of what a run measured under; of a comparison, what its candidate's run did."""
    result = record.results
    if isinstance(result, SpeedResult):
        serving = label(SpeedSpec.model_validate(record.spec)).partition(", ")[2]
        return f"{serving}, {result.input_len}+{result.output_len} tokens, {device_of(record)}"
    text, protocol = record.text, record.protocol
    assert isinstance(result, PerplexityResult | CompareResult)
    assert text is not None
    assert protocol is not None
    run, against = record, ""
    if isinstance(result, CompareResult):
        run, against = by_id.get(result.candidate_run, record), f"against {result.baseline_run}"
    parts = (
        TEXTS[text.corpus][1] if text.corpus in TEXTS else "", protocol_name(protocol),
        f"{result.windows} windows", f"text {text.sha256[:8]}", engine_of(run),
        record.model.dtype if record.model else "", against,
    )  # fmt: skip
    return ", ".join(filter(None, parts))


def _perplexity(record: Record, result: PerplexityResult, configuration: str) -> Iterator[EvalResult]:
    place = _text(record, result.windows, configuration)
    yield EvalResult(
        **place, metric_type="perplexity", metric_value=result.perplexity, metric_name="Perplexity",
        metric_args=_interval(result.low, result.high) | {"run": record.run_id},
    )  # fmt: skip
    yield EvalResult(
        **place, metric_type="bits_per_byte", metric_value=result.bits_per_byte,
        metric_name="Bits per UTF-8 byte", metric_args={"run": record.run_id},
    )  # fmt: skip


def _comparison(record: Record, result: CompareResult, configuration: str) -> Iterator[EvalResult]:
    place = _text(record, result.windows, configuration)
    against = {"baseline": result.baseline_run, "run": record.run_id}
    yield EvalResult(
        **place, metric_type="delta_ln_perplexity", metric_value=result.delta_ln_ppl,
        metric_name="Δ ln PPL against the baseline, paired by window",
        metric_args=_interval(result.low, result.high) | against,
    )  # fmt: skip
    if result.divergence is None:
        return
    yield EvalResult(
        **place, metric_type="kl_divergence", metric_value=result.divergence.mean,
        metric_name="Mean KL divergence from the baseline [nats]", metric_args=against,
    )  # fmt: skip
    yield EvalResult(
        **place, metric_type="top1_agreement", metric_value=result.divergence.top1_agreement,
        metric_name="Share of tokens with the baseline's most likely token", metric_args=against,
    )  # fmt: skip


def _speed(record: Record, result: SpeedResult, configuration: str) -> Iterator[EvalResult]:
    spec = SpeedSpec.model_validate(record.spec)
    place: dict[str, Any] = {
        "task_type": TASK,
        "task_name": TASK_NAME,
        "dataset_type": "prompts",
        "dataset_name": f"{result.input_len} prompt tokens, {result.output_len} output tokens",
        "dataset_config": configuration,
        "dataset_args": {
            "serving": spec.serving.model_dump(mode="json"),
            "workload": spec.workload.model_dump(mode="json"),
            "device": device_of(record), "versions": dict(record.machine.packages),
        },
    }  # fmt: skip
    for kind, name, estimate in (
        ("decode_tokens_per_s", "Decode tokens/s of one sequence", result.decode_tokens_per_s),
        ("output_tokens_per_s", "Output tokens/s of all sequences", result.output_tokens_per_s),
        ("ttft_s", "Time to first token [s]", result.ttft_s),
    ):
        yield EvalResult(
            **place, metric_type=kind, metric_value=estimate.mean, metric_name=name,
            metric_args=_interval(estimate.low, estimate.high) | {"run": record.run_id},
        )  # fmt: skip


def _text(record: Record, windows: int, configuration: str) -> dict[str, Any]:
    text, protocol = record.text, record.protocol
    assert text is not None
    assert protocol is not None
    corpus = str(record.spec.get("corpus", text.corpus))
    kind, _, split = TEXTS.get(text.corpus, (corpus, "", "test"))
    return {
        "task_type": TASK,
        "task_name": TASK_NAME,
        "dataset_type": kind,
        "dataset_name": text.corpus,
        "dataset_config": configuration,
        "dataset_split": split,
        "dataset_args": {
            "protocol": protocol.model_dump(mode="json"), "windows": windows, "text_sha256": text.sha256,
            "tokens": text.tokens, "tokenizer_sha256": text.tokenizer_sha256,
        },
    }  # fmt: skip


def _interval(low: float | None, high: float | None) -> dict[str, Any]:
    return {} if low is None or high is None else {"interval_95": [low, high]}
