"""`hlwq-eval ppl --moe-expert-cache-size` as a user meets it."""

import json

import numpy as np
import pandas as pd
import pytest
from engines import tiny

from cli.test_ppl import SMALL, partials, runs
from evalsuite.core.cache import ALL_RESIDENT, CacheCounters, LayerCounters
from evalsuite.core.errors import NotEngaged
from evalsuite.core.record import Record
from evalsuite.run.perplexity import with_expert_cache
from evalsuite.store.runs import load_record


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HLWQ_EVAL_CACHE", str(tmp_path / "experts"))


@pytest.fixture
def moe(tmp_path):
    return tiny.write(tiny.qwen3_5_moe(), tmp_path / "moe")


def document_of(done):
    assert done.code in (0, None), done.err
    return json.loads(done.out)


def test_the_same_nats_and_counters_in_the_record(cli, moe, text, tmp_path):
    common = ("ppl", moe, "--corpus", text, *SMALL, "--dtype", "float32", "--json")
    plain = document_of(cli(*common))
    assert plain["expert_cache"] is None
    cached = document_of(
        cli(
            *common,
            "--moe-expert-cache-size",
            4,
            "--moe-expert-cache-policy",
            "lfru",
            "--moe-expert-store",
            "disk",
        )
    )
    nats = [pd.read_parquet(tmp_path / run["path"] / "windows.parquet").nats for run in (plain, cached)]
    np.testing.assert_array_equal(*nats)
    assert plain["spec_hash"] != cached["spec_hash"]
    counters = load_record(tmp_path / cached["path"]).expert_cache
    assert (counters.size, counters.experts, counters.policy, counters.store) == (4, 16, "lfru", "disk")
    assert counters.misses > 0
    assert cached["engaged"]["expert_cache"]["misses"] == counters.misses
    assert cached["engaged"]["expert_cache"]["hits"] == counters.hits


def test_the_table_shows_it(cli, moe, text):
    done = cli("ppl", moe, "--corpus", text, *SMALL, "--moe-expert-cache-size", 4)
    assert done.code in (0, None), done.err
    assert "4 of 16 a layer (lru, pinned)" in done.out
    assert "expert bytes moved" in done.out


def test_a_dense_model_is_refused_before_anything_is_written(cli, models, text):
    done = cli("ppl", models / "base", "--corpus", text, *SMALL, "--moe-expert-cache-size", 8)
    assert done.code == 2
    assert "nothing to cache" in done.said
    assert not runs("results")
    assert not partials("results")


@pytest.mark.parametrize("size", [0, -1])
def test_a_cache_of_no_slots_is_refused(cli, moe, text, size):
    done = cli("ppl", moe, "--corpus", text, *SMALL, "--moe-expert-cache-size", size)
    assert done.code == 2
    assert not partials("results")


def counters(hits, misses):
    layer = LayerCounters(layer=0, steps=0, hits=hits, misses=misses, overflow_steps=0, bytes_moved=0)
    return CacheCounters(size=8, experts=16, policy="lru", store="pinned", expert_bytes=1, layers=(layer,))


@pytest.mark.parametrize("nothing", [None, counters(0, 0)])
def test_a_cache_that_counted_nothing_was_not_engaged(nothing):
    with pytest.raises(NotEngaged, match="stayed at zero"):
        with_expert_cache(Record.model_construct(engaged={}), nothing)
    record = with_expert_cache(Record.model_construct(engaged={"attention": "sdpa"}), counters(1, 2))
    assert record.engaged["attention"] == "sdpa"
    assert record.expert_cache.misses == 2


def test_a_cache_that_holds_every_expert_need_count_nothing():
    record = Record.model_construct(engaged={"experts": ALL_RESIDENT})
    assert with_expert_cache(record, None) is record
    with pytest.raises(NotEngaged, match="stayed at zero"):
        with_expert_cache(record, counters(0, 0))
