"""`hlwq-eval footprint` as a user runs it."""

import json
from pathlib import Path


def test_the_built_in_model_from_load_to_decode(shell, tmp_path: Path):
    short = ("--input-len", "16", "--output-len", "4", "--idle", "0.2")
    run = shell("footprint", "demo", "--engine", "torch", *short, "--json", "--results", str(tmp_path))
    assert run.returncode == 0, run.stderr
    document = json.loads(run.stdout)
    assert document["status"] == "ok"
    assert [phase["name"] for phase in document["phases"]] == ["load", "idle", "prefill", "decode"]
    assert all(phase["rss_peak_bytes"] > 1e8 for phase in document["phases"])
    assert document["telemetry"]["sampled"] == "from outside"
    assert document["telemetry"]["engine"]["weights_bytes"] > 1e7
    folder = tmp_path / document["path"]
    assert {"run.json", "telemetry.parquet", "engine.log", "footprint.png", "vram.svg"} <= {
        path.name for path in folder.iterdir()
    }
    assert "Footprint of demo" in run.stderr


def test_an_impossible_request_loads_nothing(shell, tmp_path: Path):
    run = shell(
        "footprint", "demo", "--moe-expert-cache-size", "100000", "--results", str(tmp_path / "results")
    )
    assert run.returncode == 2
    assert "100000" in run.stderr.replace(",", "")
    assert not (tmp_path / "results").exists()


def test_gpus_and_tensor_parallel_must_agree(shell):
    run = shell("footprint", "demo", "--gpus", "0,1")
    assert run.returncode == 2
    assert "--tensor-parallel-size" in run.stderr


def test_a_gpu_that_is_not_there_is_refused_before_anything_loads(shell, tmp_path: Path):
    run = shell("footprint", "demo", "--gpus", "63", "--results", str(tmp_path / "results"))
    assert run.returncode == 2
    assert "There is no GPU 63" in run.stderr
    assert not (tmp_path / "results").exists()
