"""Perplexities in the shape of lm-evaluation-harness's ``results.json``, for tools that read that file.

The harness writes one file for one model: ``results`` holds task → ``metric,filter``, beside the task's
``configs``, ``versions``, ``n-shot``, ``higher_is_better`` and ``n-samples``
(https://github.com/EleutherAI/lm-evaluation-harness). A task here is a text under a protocol, by the text's
hash, so that neither two protocols nor two texts can be taken for one; where a model has several runs of it,
what varies between them, such as the engine, is part of their names, and none is left out. The harness's own
``wikitext`` is another protocol and another task. Its
``word_perplexity`` and ``bits_per_byte`` are defined alike; ``perplexity`` is a token's. A ``_stderr`` is a
quarter of the width of the 95 % interval over windows.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from evalsuite.core.protocol import PROTOCOLS
from evalsuite.core.record import PerplexityResult, Record
from evalsuite.report.apart import words_apart
from evalsuite.report.choose import engine_of

FILTER = "none"
TASK_VERSION = 1  # of the arithmetic from samples to metrics


def lm_eval_results(records: Sequence[Record]) -> dict[str, Any]:
    """The document of one model.

    Args:
        records: finished perplexity runs of one checkpoint, newest first.
    """
    tasks = {name: record for record, name in zip(records, task_names(records), strict=True)}
    first = records[0]
    assert first.model is not None
    return {
        "results": {task: dict(_metrics(task, _result(record))) for task, record in tasks.items()},
        "group_subtasks": {task: [] for task in tasks},
        "configs": {task: _config(task, record) for task, record in tasks.items()},
        "versions": dict.fromkeys(tasks, TASK_VERSION),
        "n-shot": dict.fromkeys(tasks, 0),
        "higher_is_better": {
            task: dict.fromkeys(("perplexity", "word_perplexity", "bits_per_byte"), False) for task in tasks
        },
        "n-samples": {
            task: {"original": _result(record).windows_available, "effective": _result(record).windows}
            for task, record in tasks.items()
        },
        "config": {
            "model": engine_of(first),
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


def task_names(records: Sequence[Record]) -> list[str]:
    """The task of each run, such as ``wikitext-2-696cca6b.card-1155``; of no two runs the same."""
    words = words_apart(records, _task)
    parts = ((_task(record), *words[record.run_id]) for record in records)
    return [".".join(word.replace(" ", "-") for word in name) for name in parts]


def _task(record: Record) -> str:
    """Text and protocol, the window where it was overridden, and the windows where not all were scored."""
    text, protocol, result = record.text, record.protocol, _result(record)
    assert text is not None
    assert protocol is not None
    parts = [f"{text.corpus}-{text.sha256[:8]}", protocol.name]
    if PROTOCOLS.get(protocol.name) != protocol:
        parts.append(f"context-{protocol.context}-stride-{protocol.stride}")
    if result.windows != result.windows_available:
        parts.append(f"first-{result.windows}")
    return ".".join(parts)


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
            "engine": engine_of(record),
            "dtype": record.model.dtype if record.model else None,
            "run_id": record.run_id,
        },
    }
