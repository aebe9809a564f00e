"""Runs on a real Ray cluster of several nodes on this machine, whatever dies under them.

The built-in model, twelve short windows; every run is held against that of one machine, byte for byte.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from cluster.conftest import Watcher, small_spec
from evalsuite.cluster.connect import ClusterChoice, connected
from evalsuite.cluster.nodes import Demand
from evalsuite.cluster.order import Order
from evalsuite.cluster.perplexity import run_perplexity_on
from evalsuite.cluster.pool import RayPool
from evalsuite.core.errors import NonFiniteScore, UsageError
from evalsuite.data.models import find_checkpoint
from evalsuite.run.perplexity import prepare_request
from evalsuite.store.runs import RunStore, load_record
from evalsuite.telemetry.machine import read_machine

pytestmark = pytest.mark.xdist_group("ray")

TESTS = Path(__file__).resolve().parents[1]


def score(address, kind, folder, watcher=None, spec=None, workers=None):
    watcher = watcher or Watcher()
    chosen = ClusterChoice(address, gpu_kinds=(kind,), workers=workers)
    return run_perplexity_on(chosen, spec or small_spec(), RunStore(folder), watcher), watcher


def require_same(found, alone):
    assert (found.path / "windows.parquet").read_bytes() == (alone.path / "windows.parquet").read_bytes()
    record, reference = found.record, alone.record
    assert load_record(found.path) == record
    assert record.results.perplexity == reference.results.perplexity
    assert (record.results.low, record.results.high) == (reference.results.low, reference.results.high)
    assert record.machine.packages == reference.machine.packages
    assert sum(worker.windows for worker in record.workers) == 12 - record.results.resumed_from_window


def workers_of(root):
    """Processes of scoring workers under one raylet; what has just ended is none."""
    found = []
    for process in psutil.Process(root).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # a zombie is one
            if "ScoringWorker" in " ".join((process.name(), *process.cmdline())):
                found.append(process)
    return found


def raylet_pid(node):
    (info,) = node.all_processes["raylet"]
    return info.process.pid


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers_gives_the_run_of_one_machine(pair, tmp_path, alone, workers, monkeypatch):
    def all_of_them(pool):
        joined, opened = first(pool)
        end = time.monotonic() + 60
        while len(joined) < workers:
            assert time.monotonic() < end, f"of {workers} workers came {joined}"
            joined += [event.worker for event in pool.events()]
        return joined, opened

    first = RayPool.first
    monkeypatch.setattr(RayPool, "first", all_of_them)  # one alone could be through before the others came
    spec = small_spec(keep_hidden=workers == 2)
    found, watcher = score(pair, "pair", tmp_path, workers=workers, spec=spec)
    require_same(found, alone)
    assert watcher.counts[-1] == len(found.record.workers) == found.record.engaged["workers"] == workers
    assert all(worker.windows > 0 for worker in found.record.workers)
    assert found.record.workers[0].machine == found.record.machine
    assert found.record.workers[0].name.startswith("worker ")
    assert not any("127.0.0.1" in worker.name for worker in found.record.workers)
    if workers == 2:
        for name in ("hidden.npy", "head.safetensors"):
            assert (found.path / name).read_bytes() == (alone.path / name).read_bytes()


def test_a_killed_worker_and_a_dead_node_lose_nothing(nodes, tmp_path, alone):
    first = nodes("doomed")

    def kill_worker():
        (process,) = workers_of(raylet_pid(first))
        process.kill()

    def replace_node():
        nodes("doomed")
        processes = workers_of(raylet_pid(first))
        assert len(processes) == 1
        nodes.cluster.remove_node(first, allow_graceful=False)
        assert not psutil.wait_procs(processes, timeout=20)[1]

    found, watcher = score(nodes.address, "doomed", tmp_path, Watcher(kill_worker, replace_node))
    require_same(found, alone)
    names = [worker.name.partition(" on ") for worker in found.record.workers]
    assert [name for name, _, _ in names] == ["worker 1", "worker 2", names[-1][0]]
    places = [place for _, _, place in names]
    assert places[0] == places[1] != places[2], "the node that came late did the rest"
    assert [worker.windows > 0 for worker in found.record.workers] == [True] * 3
    assert sum("is gone" in phase for phase in watcher.phases) >= 2


def test_a_worker_that_scores_nan_is_named_and_no_number_comes_of_it(
    pair, tmp_path, demo_folder, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # not the raylet's folder: a relative path is the driver's
    poisoned = tmp_path / "poisoned"
    poisoned.mkdir()
    for path in demo_folder.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (poisoned / path.name).write_bytes(path.read_bytes())
    (weights,) = demo_folder.glob("*.safetensors")
    tensors = load_file(weights)
    name = next(name for name in sorted(tensors) if name.endswith("norm.weight"))
    tensors[name] = tensors[name] * float("nan")
    save_file(tensors, poisoned / weights.name, metadata={"format": "pt"})
    with pytest.raises(NonFiniteScore, match="worker 1 on node"):
        score(pair, "alpha", tmp_path, spec=small_spec(model="./poisoned"), workers=1)
    (partial,) = tmp_path.glob("poisoned/ppl-*.partial")
    record = json.loads((partial / "run.json").read_text())
    assert (record["status"], record["results"]) == ("failed", None)
    assert record["spec"]["model"] == "./poisoned"
    assert "worker 1 on node" in record["error"]
    assert not (partial / "windows.jsonl").exists()


def test_a_node_with_other_versions_is_refused_and_a_killed_driver_resumes(nodes, tmp_path, alone):
    other = tmp_path / "other" / "transformers-0.0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 0.0.1\n")
    nodes("odd", env_vars={"PYTHONPATH": f"{other.parent}:{os.environ.get('PYTHONPATH', '')}"})
    with pytest.raises(UsageError, match="No node of the cluster may take part") as found:
        score(nodes.address, "odd", tmp_path)
    assert "was refused: it has transformers 0.0.1, not" in found.value.cause
    node = nodes("odd")
    code = (
        "import os, sys, time; from pathlib import Path; from cluster import test_cluster as t\n"
        "watcher = t.Watcher(lambda: (os.write(1, b'written\\n'), time.sleep(60)))\n"
        f"t.score({nodes.address!r}, 'odd', Path(sys.argv[1]), watcher)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
    ) as driver:  # fmt: skip
        assert driver.stdout.readline() == "written\n"
        driver.send_signal(signal.SIGKILL)
    (partial,) = tmp_path.glob("demo/ppl-*.partial")
    before = [json.loads(line)["window"] for line in (partial / "windows.jsonl").read_text().splitlines()]
    assert before == list(range(len(before)))
    assert 0 < len(before) < 12
    end = time.monotonic() + 30
    while workers_of(raylet_pid(node)):
        assert time.monotonic() < end, "the dead driver's worker lives on"
        time.sleep(0.1)
    found, watcher = score(nodes.address, "odd", tmp_path, workers=1)
    assert watcher.done[0] == found.record.results.resumed_from_window == len(before)
    require_same(found, alone)
    assert len(found.record.workers) == 1
    assert any("is refused: it has transformers 0.0.1" in phase for phase in watcher.phases)
    assert any("was refused: it has transformers 0.0.1" in warning for warning in found.record.warnings)


def test_the_gpus_of_one_engine_are_reserved_on_one_node_and_set_free(nodes, alone):
    """The GPUs are Ray's alone: this machine has none, and the engine computes on the CPU."""
    nodes("gpus", num_gpus=4)
    spec, threads = small_spec(), 1
    with connected(nodes.address) as ray:
        stream = prepare_request(spec, Path(), Watcher()).text.stream
        order = Order(
            spec=spec, ids=stream.ids, window_bos=stream.window_bos, threads=threads, driver=read_machine(),
            fingerprint=find_checkpoint("demo").fingerprint(), demand=Demand(0.5, 2), gpu_kind="gpus",
        )  # fmt: skip
        pool = RayPool(ray, order, Watcher())
        joined, opened = pool.first()
        assert joined[0].startswith("worker ")
        assert opened.facts.fingerprint == alone.record.model.fingerprint
        groups = list(ray.util.placement_group_table().values())
        assert [group["strategy"] for group in groups] == ["STRICT_PACK"] * 2
        assert [group["bundles"][0] for group in groups] == [{"CPU": 0.5, "GPU": 2.0}] * 2
        pool.close()
        end = time.monotonic() + 20
        while {group["state"] for group in ray.util.placement_group_table().values()} != {"REMOVED"}:
            assert time.monotonic() < end, "its GPUs are still reserved"
            time.sleep(0.1)


def test_a_cluster_without_room_is_refused(pair, tmp_path):
    with pytest.raises(UsageError, match="No node of the cluster has 1 CPUs of the kind nowhere"):
        score(pair, "nowhere", tmp_path)
