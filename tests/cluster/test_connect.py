"""Addresses, and what is said where there is no cluster."""

import socket
import subprocess
import sys

import pytest

from evalsuite.cluster import connect
from evalsuite.cluster.connect import connected, is_loopback, open_to_others, resolve
from evalsuite.core.errors import MissingDependency, UsageError


def test_auto_finds_the_cluster_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(UsageError, match="No Ray cluster was found on this machine") as found:
        resolve("auto")
    assert "--temp-dir" in found.value.cause
    assert "--cluster HOST:PORT" in found.value.todo
    assert "ray start --head" in found.value.todo
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:6379\n")
    assert resolve("auto") == "127.0.0.1:6379"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert resolve("auto") == "127.0.0.1:6379"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert resolve("auto") == "10.0.0.1:6379"


@pytest.mark.parametrize("address", ["ray://host:10001", "host", "host:", ":6379", "host:port"])
def test_other_addresses_are_refused(address):
    with pytest.raises(UsageError, match="neither auto nor HOST:PORT"):
        resolve(address)


def test_a_missing_ray_is_said_plainly(monkeypatch):
    monkeypatch.setattr(connect, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency) as found:
        resolve("auto")
    assert found.value.todo == "pip install 'hlwq-eval[ray]'"


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("10.0.0.1:1", False),
        ("head:1", False),
    ],
)
def test_only_loopback_is_closed_to_others(address, loopback):
    assert is_loopback(address) == loopback
    assert (open_to_others(address) is None) == loopback


def test_a_head_that_does_not_answer_is_given_up_at_once():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(UsageError, match="No Ray cluster answers"), connected(f"127.0.0.1:{port}"):
        pass


def test_without_a_cluster_nothing_of_ray_is_imported():
    code = (
        "import sys\n"
        "from evalsuite.cli import ppl, speed, run, perplexity_run, speed_run\n"
        "import evalsuite.cluster.perplexity\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'ray'])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
