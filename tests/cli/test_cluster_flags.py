"""What the flags for a cluster refuse before anything is connected or loaded."""

import shutil

import pytest

from cli.conftest import ROOT

HEAD = ("--cluster", "127.0.0.1:1")
KINDS = ("--gpu-kind", "h100", "--gpu-kind", "a100")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ppl", "--workers", 2], "--workers is for a cluster"),
        (["ppl", "--gpu-kind", "h100"], "--gpu-kind is for a cluster"),
        (["speed", "--exclusive"], "--exclusive is for a cluster"),
        (["speed", "--gpu-kind", "h100"], "--gpu-kind is for a cluster"),
        (["ppl", "--cluster", "ray://head:10001"], "neither auto nor HOST:PORT"),
        (["ppl", "--cluster", "127.0.0.1:1", "--gpus", 0], "--gpus names GPUs of this machine"),
        (["speed", "--cluster", "127.0.0.1:1", "--dry-run"], "--dry-run is about this machine"),
        (["speed", "--cluster", "127.0.0.1:1", "--gpus", "0,1"], "--gpus is about this machine"),
        (
            ["speed", "--cluster", "127.0.0.1:1", "--server-url", "http://h"],
            "--server-url is about this machine",
        ),
        (["run", "demo.toml", "--exclusive"], "--exclusive is for a cluster"),
        (["run", "demo.toml", *HEAD, "--dry-run"], "--dry-run is about this machine"),
        (["run", "ablation.toml", *HEAD, "--dry-run"], "--dry-run is about this machine"),
        (["run", "demo.toml", *HEAD, "--only", "speed", "--workers", 2], "--workers is for perplexity"),
        (["run", "demo.toml", *HEAD, "--only", "ppl", "--exclusive"], "--exclusive is for timing"),
        (["run", "ablation.toml", *HEAD, "--exclusive"], "--exclusive is for timing"),
        (["run", "demo.toml", *HEAD, *KINDS], "Perplexity takes one --gpu-kind"),
        (["run", "ablation.toml", *HEAD, *KINDS], "Perplexity takes one --gpu-kind"),
        (["run", "demo.toml", *HEAD, "--only", "cache"], "None of these steps runs on a cluster"),
        (["speed", "--cluster", "127.0.0.1:1"], "No Ray cluster answers at 127.0.0.1:1"),
    ],
)
def test_refusals(cli, tmp_path, arguments, said):
    pytest.importorskip("ray")
    shutil.copy(ROOT / "experiments" / "demo.toml", tmp_path)
    shutil.copy(ROOT / "experiments" / "hlwq_ablation_demo.toml", tmp_path / "ablation.toml")
    found = cli(*arguments)
    assert found.code == 2, found.err
    assert said in " ".join(found.err.split())


def test_auto_without_a_cluster_says_how_to_start_one(cli, monkeypatch, tmp_path):
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    found = cli("ppl", "--cluster", "auto")
    assert found.code == 2
    assert "ray start --head" in found.err
    assert "127.0.0.1" in found.err, "loopback by default"
