"""The record: immutable, closed, and readable in every schema version that is still in results/."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from evalsuite.core.record import SCHEMA_VERSION, CompareResult, PerplexityResult, QuantizeResult, Record

GOLDEN = Path(__file__).parents[1] / "golden" / "record.json"


@pytest.fixture
def data() -> dict:
    return json.loads(GOLDEN.read_text())


def test_a_record_of_schema_1_reads_and_writes_back_alike(data: dict):
    """A field that is renamed or gone breaks every record in results/: raise the schema version then."""
    record = Record.model_validate(data)
    assert record.model_dump(mode="json", exclude_unset=True) == data
    assert record.schema_version == 1
    assert SCHEMA_VERSION == 2


def test_the_kind_of_result_is_chosen_by_its_tag(data: dict):
    assert isinstance(Record.model_validate(data).results, PerplexityResult)
    compare = {
        "kind": "compare", "baseline_run": "a", "candidate_run": "b", "windows": 9, "scored_tokens": 9,
        "baseline_perplexity": 2.0, "candidate_perplexity": 2.0, "delta_ln_ppl": 0.0,
        "low": None, "high": None, "p_value": None, "divergence": None,
    }  # fmt: skip
    assert isinstance(Record.model_validate(data | {"results": compare}).results, CompareResult)
    part = {
        "name": "all", "layer": None, "layer_class": "all", "fate": "quantized", "reason": "", "matrices": 1,
        "weights": 8, "squared_error": 0.01, "squared_weight": 1.0, "outliers": 0,
        "bytes_before": 16, "bytes_after": 4,
    }  # fmt: skip
    quantize = {
        "kind": "quantize", "source": "a", "source_fingerprint": "0", "destination": "b", "fingerprint": "1",
        "total": part, "classes": [part], "layers": [part | {"layer": 0}], "unfit": [],
        "bytes_before": 16, "bytes_after": 4, "bits_per_weight": 4.0, "code_bits_per_weight": 4.0,
        "compression_ratio": 4.0, "device": "cpu", "quantize_s": 1.0, "bytes_read": 16, "bytes_per_s": 16.0,
    }  # fmt: skip
    record = Record.model_validate(data | {"kind": "quantize", "results": quantize})
    assert isinstance(record.results, QuantizeResult)
    assert record.model_dump(mode="json")["results"] == quantize
    assert record.results.total.relative_error == pytest.approx(0.1)
    assert record.results.total.sqnr_db == pytest.approx(20)
    with pytest.raises(ValidationError, match="results"):
        Record.model_validate(data | {"results": compare | {"kind": "spead"}})


@pytest.mark.parametrize(
    "part", [(), ("machine",), ("model",), ("text",), ("results",), ("telemetry",), ("protocol",)]
)
def test_unknown_keys_are_refused_everywhere(data: dict, part: tuple[str, ...]):
    place = data
    for key in part:
        place = place[key]
    place["perplexty"] = 1
    with pytest.raises(ValidationError, match="perplexty"):
        Record.model_validate(data)


@pytest.mark.parametrize("change", [{"status": "done"}, {"kind": "spead"}, {"schema_version": 3}])
def test_unknown_values_are_refused(data: dict, change: dict):
    with pytest.raises(ValidationError, match=next(iter(change))):
        Record.model_validate(data | change)


def test_a_record_cannot_be_changed(data: dict):
    record = Record.model_validate(data)
    with pytest.raises(ValidationError, match="frozen"):
        record.status = "failed"  # type: ignore[misc]
    assert record.results is not None
    with pytest.raises(ValidationError, match="frozen"):
        record.results.windows = 3  # type: ignore[misc]


def test_numbers_carry_their_unit_in_their_name():
    """Times end in _s, sizes in bytes; a bare `time`, `memory` or `size` says too little."""

    def names(model: type) -> set[str]:
        return set(model.model_fields)  # type: ignore[attr-defined]

    from evalsuite.core import record

    every = set().union(
        *(
            names(x)
            for x in (
                record.PerplexityResult,
                record.QuantizeResult,
                record.QuantizedPart,
                record.Telemetry,
                record.ModelFacts,
                record.Gpu,
            )
        )
    )
    assert not {
        name
        for name in every
        if name.endswith(("time", "memory", "size", "seconds")) and name != "batch_size"
    }
