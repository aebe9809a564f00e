"""Process trees of real processes whose memory, files and children are known."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from evalsuite.telemetry import process
from evalsuite.telemetry.process import ProcessProbe, ProcessTree, SharedMemoryProbe

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
MIB = 1 << 20
Start = Callable[[str], subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start Python code that says when it is ready by a line and then waits for its input to close."""
    running: list[subprocess.Popen[str]] = []

    def go(code: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", f"import os, subprocess, sys\n{code}\nprint('ready', flush=True)\nsys.stdin.read()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        running.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        return child

    yield go
    for child in running:
        with contextlib.suppress(psutil.NoSuchProcess):
            for grandchild in psutil.Process(child.pid).children(recursive=True):
                grandchild.kill()
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            pipe.close()


def test_memory_that_a_child_takes(start: Start):
    small, large = start("x = None"), start(f"x = b'1' * {100 * MIB}")
    rss = [ProcessProbe(ProcessTree(c.pid)).read()["rss_bytes"] for c in (small, large)]
    assert 95 * MIB < rss[1] - rss[0] < 110 * MIB
    shared = SharedMemoryProbe(ProcessTree(large.pid)).read()
    assert shared["uss_bytes"] > 100 * MIB
    assert shared["uss_bytes"] <= shared["pss_bytes"] <= shared["uss_bytes"] + shared["shared_bytes"]


FORKS = f"""
block = bytearray(b'1' * {64 * MIB})
if os.fork() == 0:
    os.close(1)
    sys.stdin.read()
    os._exit(0)
"""


def test_pages_that_are_shared_count_once_in_pss(start: Start):
    tree = ProcessTree(start(FORKS).pid)
    assert ProcessProbe(tree).read()["processes"] == 2
    assert ProcessProbe(tree).read()["rss_bytes"] > 128 * MIB
    assert SharedMemoryProbe(tree).read()["pss_bytes"] < 100 * MIB


def test_a_grandchild_that_outlives_its_parent_stays(start: Start):
    child = start("subprocess.Popen(['sleep', '30'])")
    tree = ProcessTree(child.pid)
    members = tree.alive()
    assert len(members) == 2
    child.kill()
    child.wait()
    (left,) = tree.alive(refresh=True)
    assert left.cmdline() == ["sleep", "30"]
    assert tree.pids() == {p.pid for p in members}
    left.kill()


def test_a_child_that_comes_later_is_found(start: Start):
    child = start("print('ready', flush=True); sys.stdin.readline(); subprocess.Popen(['sleep', '30'])")
    tree = ProcessTree(child.pid)
    assert len(tree.alive()) == 1
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()
    deadline = time.monotonic() + 20
    while len(tree.alive(refresh=True)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for member in tree.alive():
        member.kill()


def test_a_root_that_is_not_there_yet(start: Start):
    pids: list[int] = []
    tree = ProcessTree(lambda: pids[0] if pids else None)
    assert tree.alive() == []
    assert ProcessProbe(tree).read() == {}
    pids.append(start("").pid)
    assert [p.pid for p in tree.alive(refresh=True)] == pids


def test_the_dead_and_the_undead_are_no_reading(start: Start):
    child = start("x = 1")
    tree = ProcessTree(child.pid)
    probe, shared = ProcessProbe(tree), SharedMemoryProbe(tree)
    assert probe.read()["processes"] == 1
    os.kill(child.pid, 9)
    deadline = time.monotonic() + 20
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
    assert (probe.read(), shared.read()) == ({}, {})
    child.wait()
    assert (probe.read(), shared.read()) == ({}, {})
    assert (probe.reasons, shared.reasons) == ({}, {})


WRITES = """
path = {path!r}
with open(path, 'wb') as file:
    file.write(os.urandom({size}))
    file.flush()
    os.fsync(file.fileno())
"""


def test_what_is_written_to_the_disk(start: Start, tmp_path: Path):
    before = ProcessProbe(ProcessTree(start("x = 1").pid)).read()["disk_written_bytes"]
    child = start(WRITES.format(path=str(tmp_path / "file"), size=8 * MIB))
    written = ProcessProbe(ProcessTree(child.pid)).read()["disk_written_bytes"]
    if written == 0:
        pytest.skip("no block device counts what is written here")
    assert 8 * MIB <= written - before < 9 * MIB


TAKES_A_CHILD = """
code = "open({path!r}, 'wb').write(bytes({size})); print('written', flush=True); input()"
other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
other.stdout.readline()
print("ready", flush=True)
sys.stdin.readline()
other.kill()
other.wait()
print("gone", flush=True)
"""


def test_counters_of_a_child_that_ended_are_kept_and_counted_once(start: Start, tmp_path: Path):
    child = start(TAKES_A_CHILD.format(path=str(tmp_path / "file"), size=4 * MIB))
    probe = ProcessProbe(ProcessTree(child.pid))
    before = probe.read()
    assert before["processes"] == 2
    if before["disk_written_bytes"] == 0:
        pytest.skip("no block device counts what is written here")
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("\n")
    child.stdin.flush()
    assert child.stdout.readline() == "gone\n"
    after = probe.read()
    assert after["processes"] == 1
    assert 4 * MIB <= before["disk_written_bytes"] <= after["disk_written_bytes"] < 5 * MIB
    assert probe.read()["disk_written_bytes"] == after["disk_written_bytes"]


LEAVES_AN_ORPHAN = """
come, go = os.pipe(), os.pipe()
middle = os.fork()
if middle == 0:
    if os.fork() == 0:
        open({path!r}, "wb").write(bytes({size}))
        os.write(come[1], str(os.getpid()).encode())
        os.read(go[0], 1)
        os._exit(0)
    os._exit(0)
os.waitpid(middle, 0)
orphan = int(os.read(come[0], 20))
print("ready", flush=True)
sys.stdin.readline()
print(orphan, flush=True)
sys.stdin.readline()
os.write(go[1], b"1")
while os.path.exists(f"/proc/{{orphan}}") and "Z" not in open(f"/proc/{{orphan}}/stat").read().split(")")[1][:3]:
    pass
with open({path!r} + "2", "wb") as file:
    file.write(bytes({size} // 2))
    file.flush()
    os.fsync(file.fileno())
print("gone", flush=True)
"""


def test_counters_of_an_orphan_are_kept_where_nobody_counts_them(start: Start, tmp_path: Path):
    root = start(LEAVES_AN_ORPHAN.format(path=str(tmp_path / "file"), size=4 * MIB))
    assert root.stdin is not None
    assert root.stdout is not None

    def told(line: str) -> str:
        assert root.stdin is not None
        assert root.stdout is not None
        root.stdin.write(f"{line}\n")
        root.stdin.flush()
        return root.stdout.readline().strip()

    orphan = int(told("who"))
    both = iter([root.pid, orphan])
    tree = ProcessTree(lambda: next(both, orphan))
    tree.alive()
    probe = ProcessProbe(tree)
    tree.alive(refresh=True)
    before = probe.read()
    assert before["processes"] == 2
    if before["disk_written_bytes"] == 0:
        pytest.skip("no block device counts what is written here")
    assert told("end") == "gone"
    after = probe.read()
    assert after["processes"] == 1
    assert before["disk_written_bytes"] >= 4 * MIB
    assert after["disk_written_bytes"] >= before["disk_written_bytes"] + 2 * MIB


def test_major_faults_of_a_name_with_brackets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = Path.read_text

    def stat(path: Path, *args: object) -> str:
        if str(path) == "/proc/7/stat":
            return "7 (a) b ( c) S 1 7 7 0 -1 4194304 102 0 33 0 0 0"
        return real(path)

    monkeypatch.setattr(Path, "read_text", stat)
    assert process._major_faults(7) == 33
