"""The shape that lm-evaluation-harness writes, and the numbers of the records in it."""

import json
from pathlib import Path

import pytest

from evalsuite.report.lm_eval import lm_eval_results, task_name
from evalsuite.store.runs import load_runs
from report.record_files import copy_runs


@pytest.fixture
def records(tmp_path: Path):
    copy_runs(tmp_path, "smollm2/ppl-*")
    return [run.record for run in load_runs(tmp_path)[0]]


def test_a_task_a_protocol(records):
    document = lm_eval_results(records)
    assert set(document["results"]) == {"wikitext-2.card-1155", "wikitext-2.paper"}
    for key in ("configs", "versions", "n-shot", "higher_is_better", "n-samples", "group_subtasks"):
        assert set(document[key]) == set(document["results"]), key
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_the_numbers_are_the_records(records):
    document = lm_eval_results(records)
    for record in records:
        found = document["results"][task_name(record)]
        result = record.results
        assert found["perplexity,none"] == result.perplexity
        assert found["perplexity_stderr,none"] == pytest.approx((result.high - result.low) / 4)
        assert found["word_perplexity,none"] == result.word_perplexity
        assert found["bits_per_byte,none"] == result.bits_per_byte
        assert document["n-samples"][task_name(record)] == {
            "original": result.windows_available, "effective": result.windows,
        }  # fmt: skip
        metadata = document["configs"][task_name(record)]["metadata"]
        assert metadata["protocol"]["stride"] == record.protocol.stride
        assert metadata["run_id"] == record.run_id


def test_a_part_of_the_text_is_a_task_of_its_own(tmp_path: Path):
    copy_runs(tmp_path, "demo/ppl-20261123T210622Z-*")
    ((run,), _) = load_runs(tmp_path)
    assert task_name(run.record) == "builtin.card-1155.first-1155", "the text has more windows"
