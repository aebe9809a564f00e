"""Traces come back as they were written, or not at all."""

import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evalsuite.core.errors import NotComparable, StorageError, UsageError
from evalsuite.experts.trace import Trace, load_trace
from experts.traces import facts, trace

COLUMNS = ("request", "position", "step", "prefill", "chosen")


@settings(deadline=None, max_examples=25)
@given(
    experts=st.sampled_from([8, 256, 257, 1000]),
    layers=st.lists(st.integers(0, 60), min_size=1, max_size=4, unique=True).map(sorted).map(tuple),
    top_k=st.integers(1, 8),
    output_len=st.integers(2, 5),
    seed=st.integers(0, 99),
)
def test_round_trip(tmp_path_factory, experts, layers, top_k, output_len, seed):
    path = tmp_path_factory.mktemp("trace") / "trace.parquet"
    written = trace(experts=experts, layers=layers, top_k=top_k, output_len=output_len, seed=seed)
    written.save(path)
    found = load_trace(path)
    assert found.facts == written.facts
    for name in COLUMNS:
        assert getattr(found, name).dtype == getattr(written, name).dtype
        np.testing.assert_array_equal(getattr(found, name), getattr(written, name))
    assert [p.name for p in path.parent.iterdir()] == ["trace.parquet"]


def test_other_readers_see_narrow_columns(tmp_path):
    trace().save(tmp_path / "t.parquet")
    schema = pq.read_schema(tmp_path / "t.parquet")
    assert schema.field("layer_1").type == pa.list_(pa.uint8(), 3)
    assert schema.field("step").type == pa.uint32()
    frame = pd.read_parquet(tmp_path / "t.parquet")
    assert frame["layer_0"].iloc[0].tolist() == trace().chosen[0, 0].tolist()


def test_a_file_is_never_half_written(tmp_path, monkeypatch):
    path = tmp_path / "t.parquet"
    trace().save(path)
    before = path.read_bytes()

    def torn(table, where, **options):
        where.write_bytes(b"PAR1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", torn)
    with pytest.raises(OSError, match="No space"):
        trace(seed=1).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"]


def test_damage_is_found_wherever_it_is(tmp_path):
    path = tmp_path / "t.parquet"
    trace(requests=40).save(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for place in [4, len(whole) - 6, *rng.integers(0, len(whole), 60).tolist()]:
        damaged = bytearray(whole)
        damaged[place] ^= 0x55
        path.write_bytes(damaged)
        try:
            found = load_trace(path)
        except (StorageError, UsageError):
            refused += 1
            continue
        # what is not covered by a checksum and can be read at all is metadata that changes no number
        for name in COLUMNS:
            np.testing.assert_array_equal(getattr(found, name), getattr(trace(requests=40), name))
    assert refused > 30


@pytest.mark.parametrize("keep", [0, 3, 100, -1, -8])
def test_a_cut_file_is_refused(tmp_path, keep):
    path = tmp_path / "t.parquet"
    trace().save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StorageError, match="damaged"):
        load_trace(path)


def test_what_is_no_trace_is_refused(tmp_path):
    with pytest.raises(UsageError, match="There is no trace"):
        load_trace(tmp_path / "missing.parquet")
    pd.DataFrame({"step": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(UsageError, match="no expert trace"):
        load_trace(tmp_path / "other.parquet")


def test_another_format_or_a_missing_layer_is_refused(tmp_path):
    path = tmp_path / "t.parquet"
    trace().save(path)
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["layer_1"]), path)
    with pytest.raises(StorageError, match="layer_1"):
        load_trace(path)
    newer = facts().model_dump_json().replace('"format":1', '"format":2')
    pq.write_table(table.replace_schema_metadata({b"hlwq_eval_trace": newer}), path)
    with pytest.raises(StorageError):
        load_trace(path)


def test_another_model_is_refused_by_name():
    source = trace()
    source.require_model("demo", "f" * 64)
    with pytest.raises(NotComparable, match=re.escape("demo (ffffffffffff), not of other (000000000000)")):
        source.require_model("other", "0" * 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": np.full((8, 2, 3), 16, np.uint8)}, "expert 16 of 16"),
        ({"step": np.array([0, 0, 0, 0, 0, 2, 1, 3], np.uint32)}, "out of order"),
        ({"prefill": np.array([1, 1, 0, 1, 1, 0, 0, 0], np.bool_)}, "out of order, or both"),
        ({"request": np.zeros(7, np.uint32)}, "not all of 8 tokens"),
        ({name: getattr(trace(), name)[:0] for name in COLUMNS}, "no tokens"),
    ],
)
def test_contradictions_are_refused(change, message):
    good = trace(requests=1)
    values = {name: getattr(good, name) for name in COLUMNS}
    with pytest.raises(ValueError, match=message):
        Trace(good.facts, **(values | change))


def test_steps_of_several_requests_at_once():
    """Two requests decode in the same pass: the step's set is the union of what both chose."""
    source = Trace(
        facts(layers=(4,), top_k=2, input_len=1, output_len=2, concurrency=2),
        request=np.array([0, 1, 0, 1], np.uint32),
        position=np.array([0, 0, 1, 1], np.uint32),
        step=np.array([0, 0, 1, 1], np.uint32),
        prefill=np.array([True, True, False, False]),
        chosen=np.array([[[3, 1]], [[1, 2]], [[5, 0]], [[9, 5]]], np.uint8),
    )
    assert list(source.sets()) == [[[1, 2, 3], [0, 5, 9]]]
    assert source.step_is_prefill().tolist() == [True, False]
    assert (source.tokens("prefill"), source.tokens("decode"), source.tokens("all")) == (2, 2, 4)
