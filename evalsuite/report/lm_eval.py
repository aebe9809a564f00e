"""Perplexities in the shape of lm-evaluation-harness's ``results.json``, for tools that read that file.

The harness writes one file for one model: ``results`` holds task → ``metric,filter``, beside the task's
``configs``, ``versions``, ``n-shot``, ``higher_is_better`` and ``n-samples``
(https://github.com/EleutherAI/lm-evaluation-harness). A task here is a text under a protocol, so that two
protocols cannot be taken for one; the harness's own ``wikitext`` is another protocol and another task. Its
``word_perplexity`` and ``bits_per_byte`` are defined alike; ``perplexity`` is a token's. A ``_stderr`` is a
quarter of the width of the 95 % interval over windows.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from evalsuite.core.record import PerplexityResult, Record

FILTER = "none"
TASK_VERSION = 1  # of the arithmetic from samples to metrics


def lm_eval_results(records: Sequence[Record]) -> dict[str, Any]:
    """The document of one model.

    Args:
        records: finished perplexity runs of one checkpoint, newest first; of two runs of one task the newer
            counts.
    """
    newest: dict[str, Record] = {}
    for record in records:
        newest.setdefault(task_name(record), record)
    first = records[0]
    assert first.model is not None
    return {
        "results": {task: dict(_metrics(task, _result(record))) for task, record in newest.items()},
        "group_subtasks": {task: [] for task in newest},
        "configs": {task: _config(task, record) for task, record in newest.items()},
        "versions": dict.fromkeys(newest, TASK_VERSION),
        "n-shot": dict.fromkeys(newest, 0),
        "higher_is_better": {
            task: dict.fromkeys(("perplexity", "word_perplexity", "bits_per_byte"), False) for task in newest
        },
        "n-samples": {
            task: {"original": _result(record).windows_available, "effective": _result(record).windows}
            for task, record in newest.items()
        },
        "config": {
            "model": str(first.engaged.get("engine", "torch")),
            "model_args": {"pretrained": first.spec.get("model"), "dtype": first.model.dtype},
            "model_num_parameters": first.model.parameters,
            "model_dtype": first.model.dtype,
            "batch_size": _result(first).batch_size,
            "device": first.model.device,
            "limit": first.spec.get("limit"),
        },
        "git_hash": first.machine.git_commit,
        "date": datetime.fromisoformat(first.started).timestamp(),
        "model_name": first.model.name,
        "model_source": first.model.stored,
        "transformers_version": first.machine.packages.get("transformers"),
        "hlwq_eval_version": first.machine.packages.get("hlwq-eval"),
    }


def task_name(record: Record) -> str:
    """Text and protocol, and the windows where not all were scored, such as ``wikitext-2.card-1155``."""
    assert record.text is not None
    assert record.protocol is not None
    result = _result(record)
    name = f"{record.text.corpus}.{record.protocol.name}"
    return name if result.windows == result.windows_available else f"{name}.first-{result.windows}"


def _result(record: Record) -> PerplexityResult:
    assert isinstance(record.results, PerplexityResult)
    return record.results


def _metrics(task: str, result: PerplexityResult) -> Iterator[tuple[str, Any]]:
    yield "alias", task
    yield f"perplexity,{FILTER}", result.perplexity
    low, high = result.low, result.high
    yield f"perplexity_stderr,{FILTER}", "N/A" if low is None or high is None else (high - low) / 4
    if result.word_perplexity is not None:
        yield f"word_perplexity,{FILTER}", result.word_perplexity
    yield f"bits_per_byte,{FILTER}", result.bits_per_byte


def _config(task: str, record: Record) -> dict[str, Any]:
    assert record.text is not None
    assert record.protocol is not None
    return {
        "task": task,
        "dataset_path": record.text.corpus,
        "dataset_kwargs": {"sha256": record.text.sha256, "source": record.text.source},
        "output_type": "loglikelihood_rolling",
        "num_fewshot": 0,
        "metric_list": [
            {"metric": metric, "aggregation": metric, "higher_is_better": False}
            for metric in ("perplexity", "word_perplexity", "bits_per_byte")
        ],
        "metadata": {
            "version": TASK_VERSION,
            "protocol": record.protocol.model_dump(mode="json"),
            "tokenizer": record.text.tokenizer,
            "tokenizer_sha256": record.text.tokenizer_sha256,
            "run_id": record.run_id,
        },
    }
