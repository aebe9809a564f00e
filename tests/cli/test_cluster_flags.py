"""What the flags for a cluster refuse before anything is connected or loaded."""

import pytest


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
        (["speed", "--cluster", "127.0.0.1:1"], "No Ray cluster answers at 127.0.0.1:1"),
    ],
)
def test_refusals(cli, arguments, said):
    pytest.importorskip("ray")
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
