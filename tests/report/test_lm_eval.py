"""The shape that lm-evaluation-harness writes, and the numbers of the records in it."""

import json
from pathlib import Path

import pytest

from evalsuite.report.lm_eval import lm_eval_results, task_names
from evalsuite.store.runs import load_runs
from report.record_files import copy_runs


@pytest.fixture
def records(tmp_path: Path):
    copy_runs(tmp_path, "smollm2/ppl-*")
    return [run.record for run in load_runs(tmp_path)[0]]


def test_a_task_a_protocol(records):
    document = lm_eval_results(records)
    assert set(document["results"]) == {"wikitext-2-696cca6b.card-1155", "wikitext-2-696cca6b.paper"}
    for key in ("configs", "versions", "n-shot", "higher_is_better", "n-samples", "group_subtasks"):
        assert set(document[key]) == set(document["results"]), key
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_the_numbers_are_the_records(records):
    document = lm_eval_results(records)
    for record, task in zip(records, task_names(records), strict=True):
        found = document["results"][task]
        result = record.results
        assert found["perplexity,none"] == result.perplexity
        assert found["perplexity_stderr,none"] == pytest.approx((result.high - result.low) / 4)
        assert found["word_perplexity,none"] == result.word_perplexity
        assert found["bits_per_byte,none"] == result.bits_per_byte
        assert document["n-samples"][task] == {
            "original": result.windows_available, "effective": result.windows,
        }  # fmt: skip
        metadata = document["configs"][task]["metadata"]
        assert metadata["protocol"]["stride"] == record.protocol.stride
        assert metadata["run_id"] == record.run_id


def test_a_part_of_the_text_is_a_task_of_its_own(tmp_path: Path):
    copy_runs(tmp_path, "demo/ppl-20261123T210622Z-*")
    ((run,), _) = load_runs(tmp_path)
    assert task_names([run.record]) == ["builtin-449179c4.card-1155.first-1155"], "the text has more windows"


def test_no_run_is_lost(tmp_path: Path):
    copy_runs(tmp_path, "demo/ppl-*")
    records = [run.record for run in load_runs(tmp_path)[0]]
    narrow = records[0].protocol.override(context=512)
    records += [
        records[0].model_copy(update={"run_id": "demo/ppl-narrow", "protocol": narrow}),
        records[0].model_copy(update={"run_id": "demo/ppl-later", "started": "2026-11-26T00:00:00+00:00"}),
    ]
    document = lm_eval_results(records)
    by_run = {config["metadata"]["run_id"]: task for task, config in document["configs"].items()}
    assert set(by_run) == {record.run_id for record in records}
    assert len(document["results"]) == len(records)
    for record in records:
        task = by_run[record.run_id]
        assert document["configs"][task]["dataset_kwargs"]["sha256"] == record.text.sha256
        assert document["results"][task]["perplexity,none"] == record.results.perplexity
    assert ".context-512-stride-256" in by_run["demo/ppl-narrow"]
    assert all(" " not in task for task in by_run.values())
