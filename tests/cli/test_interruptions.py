"""Killed, interrupted, torn and resumed: the samples end byte for byte as those of a quiet run."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from cli.conftest import command, environment

BATCH = ("--batch-size", 2, "--dtype", "float32", "--limit", 24)
ARGUMENTS = ("ppl", "demo", "--context", 512, "--stride", 128, *BATCH)


def partial(folder):
    found = list(folder.glob("results/*/*.partial"))
    return found[0] if found else None


def lines(folder):
    path = partial(folder)
    path = path / "windows.jsonl" if path else None
    return path.read_bytes().count(b"\n") if path and path.exists() else 0


def broken_off(folder, sign, arguments=ARGUMENTS):
    """Start, wait for the first windows, send a signal; the exit code, negative for a signal's own."""
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command(*arguments),
            cwd=folder,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=log,
            # a shell's background job ignores Ctrl-C, and hands that on to its children
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        end = time.monotonic() + 120
        while lines(folder) < 4:
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < end
            time.sleep(0.005)
        process.send_signal(sign)
        return process.wait(60)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quiet")
    done = subprocess.run(
        command(*ARGUMENTS, "--json"),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return (folder / json.loads(done.stdout)["path"] / "windows.parquet").read_bytes()


def resumed(shell, tmp_path, *more):
    done = shell(*ARGUMENTS, "--json", *more)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert partial(tmp_path) is None
    return document["results"]["resumed_from_window"], (
        tmp_path / document["path"] / "windows.parquet"
    ).read_bytes()


@pytest.mark.xdist_group("interruptions")
class TestBrokenOff:
    def test_kill_9_and_a_torn_last_line(self, shell, tmp_path, quiet):
        assert broken_off(tmp_path, signal.SIGKILL) == -signal.SIGKILL
        path = partial(tmp_path) / "windows.jsonl"
        before = lines(tmp_path)
        assert 4 <= before < 24
        with path.open("ab") as file:
            file.write(b'{"window":' + str(before).encode() + b',"na')
        start, samples = resumed(shell, tmp_path)
        assert start >= 4
        assert start % 2 == 0
        assert samples == quiet

    def test_control_c(self, shell, tmp_path, quiet):
        assert broken_off(tmp_path, signal.SIGINT) == 130
        log = Path(tmp_path / "log").read_text()
        assert "the same command resumes there" in log
        assert "Traceback" not in log
        record = json.loads((partial(tmp_path) / "run.json").read_text())
        assert record["status"] == "interrupted"
        assert record["results"] is None
        start, samples = resumed(shell, tmp_path, "--resume")
        assert start >= 4
        assert samples == quiet

    def test_what_may_not_be_resumed(self, cli, tmp_path):
        assert broken_off(tmp_path, signal.SIGKILL) == -signal.SIGKILL
        same = ("ppl", "demo", "--limit", 24, "--batch-size", 2)
        for changes, named in (
            (
                ("--context", 512, "--stride", 128, "--dtype", "bfloat16"),
                "dtype was float32, is now bfloat16",
            ),
            (("--context", 256, "--stride", 128, "--dtype", "float32"), "context was 512, is now 256"),
        ):
            done = cli(*same, *changes, "--resume")
            assert done.code == 2
            assert named in done.said
            assert "--fresh" in done.said
        before = lines(tmp_path)
        done = cli(*ARGUMENTS, "--fresh", "--json")
        assert done.code == 0
        assert json.loads(done.out)["results"]["resumed_from_window"] == 0
        assert lines(tmp_path) == before, "the unfinished run is left alone"
