"""`hlwq-eval speed` end to end on the built-in model, and what it refuses before anything loads."""

import json

import pandas as pd
import pytest

SMALL = ("--input-len", 16, "--output-len", 4, "--repeats", 2, "--warmup", 1, "--corpus")


@pytest.mark.slow
def test_a_sweep_over_cache_sizes_and_its_resumption(cli, tmp_path, text):
    arguments = ("speed", "--cache-sizes", "8", *SMALL, text, "--json")
    done = cli(*arguments)
    assert done.code == 0, done.err
    cells = json.loads(done.out)
    assert [c["spec"]["serving"]["moe_expert_cache_size"] for c in cells] == [8, None]
    cached, whole = cells
    assert {c["status"] for c in cells} == {"ok"}
    assert cached["expert_cache"]["size"] == 8
    assert cached["engaged"]["expert_cache_hits"] + cached["engaged"]["expert_cache_misses"] > 0
    assert whole["expert_cache"] is None
    assert cached["results"]["bound"]["transfer_bytes_per_token"] > 0
    assert cached["engaged"]["engine"] == "torch"
    assert cached["telemetry"]["rss_peak_bytes"] > 0
    tokens = [pd.read_parquet(tmp_path / c["path"] / "tokens.parquet")["token"].tolist() for c in cells]
    assert tokens[0] == tokens[1]  # a cache changes no token
    assert "this is the built-in one" in done.said
    assert "an uncached run is added" in done.said
    assert "same tokens" in done.said
    for name in ("speed.md", "speed_cache.png", "speed_cache.svg"):
        assert (tmp_path / "results" / "demo" / name).stat().st_size > 500
    again = cli(*arguments)
    assert "2 of 2 cells were measured before" in again.said
    assert [c["run_id"] for c in json.loads(again.out)] == [c["run_id"] for c in cells]


def test_a_dry_run_loads_nothing_and_writes_nothing(cli, tmp_path, text):
    done = cli(
        "speed", "--cache-sizes", "4,8,all", "--concurrency", "1,8", *SMALL, text, "--dry-run", "--json"
    )
    assert done.code == 0, done.err
    cells = json.loads(done.out)
    assert len(cells) == 6
    assert all(c["fits"] and c["tokens_per_s"] > 0 for c in cells)
    four, *_ = cells
    assert four["all_misses_tokens_per_s"] < four["tokens_per_s"]
    assert "every step overflows" in done.said
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--cache-sizes", "200"), "A cache of 200 experts was asked for, and demo has 128"),
        (("--cache-sizes", "8,8"), "names a value twice"),
        (("--cache-sizes", "many"), "is not a list of whole numbers"),
        (("--modes", "fast"), "There is no mode 'fast'"),
        (("--modes", "graphs"), "CUDA graphs need a GPU"),
        (("--gpus", "0"), "There is no GPU 0"),
        (("--gpus", "0", "--cache-sizes", "8"), "There is no GPU 0"),
        (("--tensor-parallel-size", "2"), "needs as many GPUs"),
        (("--input-len", "4090"), "demo has a context of 4,096"),
        (("--max-model-len", "50"), "--max-model-len is 50"),
        (("--concurrency", "0"), "is not a list of whole numbers from 1"),
        (("--additional-config", "{"), "is not valid JSON"),
        (("--additional-config", "[]"), "is not a JSON object"),
        (("--server-url", "http://127.0.0.1:9", "--modes", "eager"), "cannot be chosen for a server"),
        (("--server-url", "http://127.0.0.1:9"), "check --server-url"),
        (("--resume",), "No cell of this sweep has been measured"),
        (("nosuch",), "No model is called 'nosuch'"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_loads(cli, tmp_path, monkeypatch, arguments, said):
    monkeypatch.setattr("evalsuite.telemetry.machine.read_gpus", lambda: ((), None, None))
    done = cli("speed", *arguments)
    assert done.code == 2
    assert said in done.said
    assert "Next:" in done.err or "JSON" in done.err
    assert not (tmp_path / "results").exists()


def test_a_model_without_experts_has_no_cache(cli, models, text):
    done = cli("speed", models / "base", "--cache-sizes", "8", *SMALL, text)
    assert (done.code, "has no experts" in done.said) == (2, True)
