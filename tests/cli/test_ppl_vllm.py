"""`hlwq-eval ppl --engine vllm` as a user meets it: the real vLLM, on the CPU, on the built-in model."""

import json
import signal

import pandas as pd
import pytest
from vllm_cpu.present import ENVIRONMENT, needs_vllm

from cli.test_interruptions import broken_off, lines, partial

WINDOWS = ("--context", 512, "--stride", 128, "--limit")
VLLM = ("ppl", "demo", "--engine", "vllm", *WINDOWS)


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@needs_vllm
@pytest.mark.xdist_group("vllm scorer")
def test_vllm_against_a_run_of_torch(cli, tmp_path):
    first = cli("ppl", "demo", "--engine", "torch", "--keep-hidden", "--json", *WINDOWS, 24)
    assert first.code == 0, first.err
    baseline = json.loads(first.out)
    second = cli(*VLLM, 24, "--baseline", baseline["path"], "--json")
    assert second.code == 0, second.err
    document = json.loads(second.out)  # and nothing else
    assert baseline["engaged"]["engine"] == "torch"
    assert document["engaged"]["engine"] == "vllm"
    assert document["engaged"]["engine_why"] == "asked for"
    assert document["model"]["computed"] == "bfloat16 on cpu by vLLM"
    compared = document["comparison"]["results"]
    assert compared["windows"] == 24
    assert abs(compared["delta_ln_ppl"]) < 0.01
    assert 0 < compared["divergence"]["mean"] < 0.01
    assert compared["divergence"]["top1_agreement"] > 0.97
    frames = [pd.read_parquet(tmp_path / run["path"] / "windows.parquet") for run in (baseline, document)]
    gaps = (frames[0]["nats"] - frames[1]["nats"]) / frames[0]["scored"]
    assert gaps.abs().max() < 0.05
    assert "Traceback" not in second.err
    assert "recomputing both sets of logits" in second.err
    assert (tmp_path / document["path"] / "convergence.png").stat().st_size > 1000


@needs_vllm
@pytest.mark.xdist_group("vllm scorer")
def test_killed_and_resumed_by_the_same_engine_only(cli, tmp_path):
    killed = broken_off(tmp_path, signal.SIGKILL, (*VLLM, 60, "--batch-size", 4))
    assert killed == -signal.SIGKILL
    before = lines(tmp_path)
    assert 4 <= before < 60
    identity = json.loads((partial(tmp_path) / "identity.json").read_text())
    assert identity["engine"] == "vllm"
    assert "cpu" in identity["vllm"]
    other = cli("ppl", "demo", "--engine", "torch", "--resume", *WINDOWS, 60)
    assert other.code == 2
    done = cli(*VLLM, 60, "--batch-size", 4, "--resume", "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["results"]["resumed_from_window"] == before
    assert document["results"]["windows"] == 60
    assert partial(tmp_path) is None


@pytest.mark.parametrize(
    ("arguments", "named", "step"),
    [
        (["--engine", "server"], "no hidden states", "--engine vllm"),
        (["--engine", "torch", "--tensor-parallel-size", 2], "scores on one device", "--engine vllm"),
        (["--engine", "torch", "--additional-config", '{"a": 1}'], "is vLLM's", "leave it out"),
        (["--additional-config", "{"], "not valid JSON", "give a JSON object"),
        (["--additional-config", "[1]"], "not a JSON object", "gdn_prefill_backend"),
        (["--tensor-parallel-size", 0], "--tensor-parallel-size", "--help"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_bad_flags(cli, arguments, named, step, tmp_path):
    done = cli("ppl", *arguments)
    assert done.code == 2
    assert named in done.said
    assert step in done.said
    assert not list(tmp_path.glob("results/*/*"))


@needs_vllm
def test_a_type_that_vllm_has_no_kernel_for_is_refused_before_loading(cli, tmp_path):
    done = cli(*VLLM, 60, "--dtype", "float32")
    assert done.code == 2
    assert "bfloat16 only" in done.said
    assert not list(tmp_path.glob("results/*/*"))
