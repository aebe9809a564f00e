"""The model card: front matter that the hub reads back, values that were measured, and what is missing."""

import re
import shlex
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from evalsuite.core.errors import UsageError
from evalsuite.data.models import Checkpoint
from evalsuite.report.card import CardRequest, absences, make_card
from evalsuite.report.card_metadata import card_data
from evalsuite.report.choose import newest
from evalsuite.report.quick_start import quick_start
from evalsuite.store.runs import load_record, load_runs
from report.record_files import copy_runs

ROOT = Path(__file__).resolve().parents[2]
RESULTS = (ROOT / "results",)
INT4, GEOMETRY = "demo-rtn-int4-0ffffe92", "qwen3.5-35b-a3b-int4"


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    request = CardRequest(RESULTS, INT4, licence="apache-2.0", base_model="owner/base")
    made = make_card(request, folder / "figures", "figures")
    (folder / "MODEL_CARD.md").write_text(made.text)
    return folder, made


def metrics(path):
    return ModelCard.load(path / "MODEL_CARD.md").data.eval_results


def test_the_front_matter_is_read_back(card):
    data = ModelCard.load(card[0] / "MODEL_CARD.md").data
    assert (data.license, data.base_model, data.model_name) == ("apache-2.0", "owner/base", "demo-rtn-int4")
    assert data.pipeline_tag == "text-generation"
    assert "compressed-tensors" in data.tags


def test_every_value_is_the_one_of_its_run(card):
    found = {result.metric_type: result for result in metrics(card[0])}
    assert set(found) == {
        "perplexity",
        "bits_per_byte",
        "delta_ln_perplexity",
        "kl_divergence",
        "top1_agreement",
    }
    scored = load_record(RESULTS[0] / found["perplexity"].metric_args["run"])
    assert found["perplexity"].metric_value == scored.results.perplexity
    assert found["perplexity"].metric_args["interval_95"] == [scored.results.low, scored.results.high]
    assert found["bits_per_byte"].metric_value == scored.results.bits_per_byte
    args = found["perplexity"].dataset_args
    assert args["protocol"] == scored.protocol.model_dump(mode="json")
    assert (args["windows"], args["text_sha256"]) == (1155, scored.text.sha256)
    compared = load_record(RESULTS[0] / found["delta_ln_perplexity"].metric_args["run"]).results
    assert found["delta_ln_perplexity"].metric_value == compared.delta_ln_ppl
    assert found["kl_divergence"].metric_value == compared.divergence.mean
    assert found["top1_agreement"].metric_value == compared.divergence.top1_agreement
    assert found["delta_ln_perplexity"].metric_args["baseline"] == compared.baseline_run


def test_the_hub_merges_no_two_runs():
    records = [run.record for run in load_runs(RESULTS[0])[0] if run.record.run_id.startswith("demo/")]
    scored = next(record for record in records if record.kind == "ppl")
    narrow = [scored.protocol.override(context=context) for context in (512, 1024)]
    changes = (
        {"protocol": narrow[0]},
        {"protocol": narrow[1]},
        {"model": scored.model.model_copy(update={"device_name": "another"})},
        {"started": "2026-11-26T00:00:00+00:00"},
        {"spec_hash": "0123456789ab"},
    )
    records += [scored.model_copy(update={"run_id": f"demo/{i}"} | c) for i, c in enumerate(changes)]
    by_id = {record.run_id: record for record in records}
    data = card_data("demo", records, licence=None, base_model=None)
    found = ModelCard(f"---\n{data.to_yaml()}\n---\n").data.eval_results
    keys: dict[object, set[str]] = {}
    for result in found:
        record = by_id[result.metric_args["run"]]
        assert result.dataset_args["text_sha256"] == record.text.sha256
        assert result.dataset_args["protocol"] == record.protocol.model_dump(mode="json")
        keys.setdefault(result.unique_identifier, set()).add(record.run_id)
    assert all(len(runs) == 1 for runs in keys.values())
    assert set.union(*keys.values()) == {r.run_id for r in records if r.kind in ("ppl", "compare")}
    configurations = {result.metric_args["run"]: result.dataset_config for result in found}
    for run, words in {
        "demo/ppl-20261125T021112Z-6a4890e6a4da": "text 71f2ff5d, vllm, bfloat16",
        "demo/ppl-20261123T213431Z-71ee07572b51": "text 71f2ff5d, torch, bfloat16",
        "demo/ppl-20261123T210622Z-e09cfbb4e7ac": "text 449179c4, torch, bfloat16",
        "demo/0": "card-1155* (context 512, stride 256), 1155 windows",
    }.items():
        assert words in configurations[run]


def test_two_protocols_are_two_results(tmp_path):
    made = make_card(CardRequest(RESULTS, "smollm2"), tmp_path / "figures", "figures")
    (tmp_path / "MODEL_CARD.md").write_text(made.text)
    found = [result for result in metrics(tmp_path) if result.metric_type == "perplexity"]
    assert len(found) == 2
    for result in found:
        name = result.dataset_args["protocol"]["name"]
        assert name in result.dataset_config
        record = load_record(RESULTS[0] / result.metric_args["run"])
        assert record.protocol.name == name
        assert record.results.perplexity == result.metric_value
        assert (result.dataset_type, result.dataset_split) == ("Salesforce/wikitext", "test")


def test_random_weights_have_speeds_and_no_quality(tmp_path):
    copy_runs(tmp_path / "results", f"{GEOMETRY}/speed-*")
    made = make_card(CardRequest((tmp_path / "results",), GEOMETRY), tmp_path / "figures", "figures")
    (tmp_path / "MODEL_CARD.md").write_text(made.text)
    found = metrics(tmp_path)
    assert {result.metric_type for result in found} == {
        "decode_tokens_per_s",
        "output_tokens_per_s",
        "ttft_s",
    }
    configurations = {result.dataset_config for result in found}
    measured = newest(load_runs(tmp_path / "results")[0])
    assert len(configurations) == len(measured) > 20  # none merge
    assert all("NVIDIA H" in configuration for configuration in configurations)
    assert "Random weights in the model's shape" in made.text
    assert "Quick start" not in made.text
    assert "- Perplexity: `hlwq-eval ppl" in made.text
    assert "- Memory and disk over time: `hlwq-eval footprint" in made.text
    assert "Speed with CUDA graphs" not in made.text  # both modes are there
    assert "Speed in eager mode" not in made.text


def test_pictures_and_tables_are_those_of_the_report(card):
    folder, made = card
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", made.text)
    assert pictures
    assert all((folder / path).is_file() for path in pictures)
    tables = [t for s in made.report.sections if s.anchor not in ("flags", "provenance") for t in s.tables]
    assert all(table.to_markdown() in made.text for table in tables)
    assert {run.record.model.name for run in made.report.runs if run.record.model} == {"demo", INT4}


def test_the_commands_name_what_they_need(card):
    block = card[1].text.partition("## Measure it again")[2].partition("```sh\n")[2].partition("```")[0]
    lines = [shlex.split(line) for line in block.splitlines()]
    assert {line[0] for line in lines} == {"hlwq-eval"}
    order = [line[1] for line in lines]
    assert order == sorted(order, key=["quantize", "ppl", "compare", "speed", "footprint"].index)
    (made,) = [line[3] for line in lines if line[1] == "quantize"]  # of the baseline's others, none
    assert INT4 in made
    assert made in {line[2] for line in lines if line[1] == "ppl"}


def test_the_quick_start_says_what_it_knows(card):
    found = quick_start(card[1].records)
    assert found.commands[0].startswith("vllm serve ")
    assert re.search(r"Probed on vLLM|was not asked|not probed", found.statement)
    assert "No run here served it" not in found.statement
    by_torch = [record for record in card[1].records if record.engaged.get("engine") != "vllm"]
    assert "No run here served it with vLLM" in quick_start(by_torch).statement


@pytest.mark.parametrize("name", ["demo", "smollm2"])
def test_a_model_that_vllm_cannot_find_has_no_quick_start(name):
    records = [run.record for run in load_runs(RESULTS[0])[0] if run.record.spec.get("model") == name]
    assert records
    assert quick_start(records) is None


def test_no_flags_are_not_all_known(card, monkeypatch):
    monkeypatch.setattr("evalsuite.report.quick_start.require_vllm", lambda: "0.1")
    monkeypatch.setattr("evalsuite.report.quick_start.engine_fields", frozenset)
    monkeypatch.setattr(
        "evalsuite.report.quick_start.find_checkpoint", lambda *_, **__: Checkpoint("m", ROOT)
    )
    for flags, said in (([], "it needs no flag."), (["--a", "1"], "every flag is one that it has.")):
        monkeypatch.setattr("evalsuite.report.quick_start._probed", lambda *_, flags=flags: flags)
        assert said in quick_start(card[1].records).statement


def test_without_vllm_the_quick_start_says_so(card, monkeypatch):
    monkeypatch.setattr("evalsuite.engines.vllm_arguments.vllm_installed", lambda: None)
    assert "not probed: vLLM is not installed" in quick_start(card[1].records).statement


def test_what_was_measured_is_not_missing(card):
    missing = absences(card[1].records)
    assert not any(line.startswith(("Perplexity", "What quantization", "KL")) for line in missing)
    assert any(line.startswith("Memory and disk") for line in missing)


@pytest.mark.parametrize(("model", "said"), [("other", "No run measured 'other'"), (None, "records are of")])
def test_a_card_is_of_one_model_that_was_measured(model, said, tmp_path):
    with pytest.raises(UsageError, match=said) as found:
        make_card(CardRequest(RESULTS, model), tmp_path / "figures", "figures")
    assert INT4 in found.value.todo
    assert not any(tmp_path.iterdir())
