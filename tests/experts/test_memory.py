"""Free memory under made-up control groups."""

import psutil
import pytest

from evalsuite.experts.memory import free_ram_bytes

GIB = 1 << 30


def group(folder, limit, used, droppable, version=2):
    names = ("memory.max", "memory.current")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    total = "total_" if version == 1 else ""
    half = droppable // 2
    (folder / "memory.stat").write_text(f"anon 1\n{total}active_file {half}\n{total}inactive_file {half}\n")


@pytest.fixture(autouse=True)
def _machine(monkeypatch):
    memory = type("Memory", (), {"available": 100 * GIB})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def free(tmp_path, lines):
    (tmp_path / "cgroup").write_text(lines)
    return free_ram_bytes(tmp_path / "cgroup", tmp_path / "fs")


def test_the_machine_where_no_group_has_a_limit(tmp_path):
    group(tmp_path / "fs" / "a", "max", GIB, 0)
    assert free(tmp_path, "0::/a\n") == 100 * GIB
    assert free_ram_bytes(tmp_path / "missing", tmp_path) == 100 * GIB


def test_a_container_sees_its_group_at_the_root(tmp_path):
    group(tmp_path / "fs", 8 * GIB, 5 * GIB, 2 * GIB)
    assert free(tmp_path, "0::/\n") == 5 * GIB


def test_the_tightest_of_all_groups_above_holds(tmp_path):
    group(tmp_path / "fs" / "a", 4 * GIB, 3 * GIB, 0)
    group(tmp_path / "fs" / "a" / "b", 9 * GIB, 1 * GIB, 0)
    assert free(tmp_path, "0::/a/b\n") == GIB


def test_version_1(tmp_path):
    group(tmp_path / "fs" / "memory" / "docker", 6 * GIB, 2 * GIB, GIB, version=1)
    assert free(tmp_path, "5:cpu,cpuacct:/docker\n3:memory:/docker\n") == 5 * GIB
