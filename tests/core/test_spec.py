"""Specs: what they refuse, and a hash that is stable and complete."""

import json
import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from evalsuite.core.protocol import protocol
from evalsuite.core.spec import CompareSpec, PerplexitySpec, QuantizeSpec, Serving, canonical_json, spec_hash

SPEC = PerplexitySpec(model="demo", corpus="builtin", protocol=protocol("card-1155"))

# one other value for every field
CHANGES = {
    "model": "smollm2",
    "engine": "torch",
    "corpus": "wikitext-2",
    "protocol": protocol("card-1155").override(context=2048),
    "limit": 8,
    "tokenizer": "demo",
    "dtype": "float32",
    "device": "cpu",
    "batch_size": 4,
    "trust_remote_code": True,
    "tensor_parallel_size": 2,
    "moe_expert_cache_size": 8,
    "moe_expert_cache_policy": "lfru",
    "moe_expert_store": "disk",
    "gpu_memory_utilization": 0.3,
    "additional_config": {"gdn_prefill_backend": "triton"},
    "server_url": "http://127.0.0.1:8000",
    "keep_hidden": True,
}


def test_the_hash_is_stable():
    """Results folders carry it in their names: a change here orphans every unfinished run."""
    assert spec_hash(SPEC) == "46867a8fc67e"
    assert spec_hash(CompareSpec(baseline="a/b", candidate="c/d")) == "04f5eb9ba4bc"


def test_the_hash_of_a_quantization_is_stable_and_complete():
    spec = QuantizeSpec(source="demo", recipe={"method": "rtn", "group_size": 128, "hadamard": True})
    assert spec_hash(spec) == "e3d7d76a3672"
    changes = ({"source": "x"}, {"device": "cpu"}, {"recipe": {**spec.recipe, "group_size": 64}})
    assert len({spec_hash(spec), *(spec_hash(spec.model_copy(update=change)) for change in changes)}) == 4
    assert QuantizeSpec.model_validate_json(spec.model_dump_json()) == spec


def test_every_field_changes_the_hash():
    assert set(CHANGES) | {"kind"} == set(PerplexitySpec.model_fields)
    hashes = {spec_hash(SPEC.model_copy(update={field: value})) for field, value in CHANGES.items()}
    assert len(hashes | {spec_hash(SPEC)}) == len(CHANGES) + 1


def test_every_field_of_the_protocol_changes_the_hash():
    changes = {"name": "x", "join": "raw", "context": 512, "stride": 255, "scored": "second-half",
               "first_window": "whole", "tail": "short", "bos": "text"}  # fmt: skip
    assert set(changes) | {"averaging"} == set(type(SPEC.protocol).model_fields)
    hashes = {
        spec_hash(SPEC.model_copy(update={"protocol": SPEC.protocol.model_copy(update={field: value})}))
        for field, value in changes.items()
    }
    assert len(hashes | {spec_hash(SPEC)}) == len(changes) + 1


def test_a_spec_reads_back_from_its_json_with_the_same_hash():
    again = PerplexitySpec.model_validate_json(json.dumps(SPEC.model_dump(mode="json")))
    assert again == SPEC
    assert spec_hash(again) == spec_hash(SPEC)


@pytest.mark.parametrize(
    "change",
    [
        {"limits": 8},
        {"limit": 0},
        {"limit": -1},
        {"dtype": "fp8"},
        {"device": "cuda"},
        {"device": "cuda:x"},
        {"device": "cpu "},
        {"batch_size": 0},
        {"batch_size": "big"},
        {"engine": "vllm "},
        {"kind": "compare"},
        {"protocol": {"name": "x", "context": 8, "stride": 9}},
        {"protocol": {"name": "x", "context": 8, "stride": 4, "windows": 3}},
    ],
    ids=str,
)
def test_what_is_misspelt_or_out_of_range_is_refused(change: dict[str, object]):
    with pytest.raises(ValidationError) as caught:
        PerplexitySpec.model_validate(SPEC.model_dump() | change)
    assert next(iter(change)) in str(caught.value)


@pytest.mark.parametrize(
    ("given", "kept"), [("model", "model"), ("uniform_random", "uniform_random"), ("zipf:1.0", "zipf:1"), ("zipf:0.25", "zipf:0.25")]
)  # fmt: skip
def test_a_routing_has_one_name(given: str, kept: str):
    assert Serving(moe_routing=given).moe_routing == kept


@pytest.mark.parametrize(
    "given", ["zipf", "zipf:", "zipf:0", "zipf:-1", "zipf:nan", "zipf:9", "uniform", "Zipf:1"]
)
def test_an_unknown_routing_is_refused_with_those_that_there_are(given: str):
    with pytest.raises(ValidationError, match="model, uniform_random and zipf:S, such as zipf:1"):
        Serving(moe_routing=given)


def test_a_spec_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        SPEC.limit = 3  # type: ignore[misc]


def test_canonical_json_is_one_text_for_one_value():
    assert canonical_json({"b": 1, "a": [1.5, None, "é"]}) == '{"a":[1.5,null,"\\u00e9"],"b":1}'
    assert canonical_json({"a": 1, "b": 2}) == canonical_json({"b": 2, "a": 1})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_canonical_json_refuses_what_json_does_not_have(value: float):
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"nats": value})


def test_fields_that_came_later_leave_the_hash_of_old_specs_alone():
    """Otherwise every finished run in results/ would be looked for in vain."""
    paths = sorted((Path(__file__).parents[2] / "results").glob("*/ppl-*/run.json"))
    assert paths
    for path in paths:
        record = json.loads(path.read_text())
        assert spec_hash(PerplexitySpec.model_validate(record["spec"])) == record["spec_hash"]


def test_fields_that_came_later_count_once_they_are_set():
    assert spec_hash(SPEC) != spec_hash(SPEC.model_copy(update={"moe_expert_cache_size": 8}))
