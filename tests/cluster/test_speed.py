"""A sweep on a real Ray cluster: cells on every kind of node, records in the driver's folder alone."""

import pytest
from run.conftest import Watcher as Sweeping

from evalsuite.cluster.benches import survey
from evalsuite.cluster.connect import ClusterChoice
from evalsuite.cluster.nodes import read_node
from evalsuite.cluster.places import Bench, Errand, Places
from evalsuite.cluster.speed import run_sweep_on
from evalsuite.core.errors import EngineDied, UsageError
from evalsuite.core.record import Machine
from evalsuite.core.spec import Serving, SpeedSpec, Workload
from evalsuite.data.corpora import load_corpus
from evalsuite.run.speed import Plan
from evalsuite.run.subject import prepare
from evalsuite.store.runs import RunStore, load_record


@pytest.mark.xdist_group("ray")
def test_every_kind_of_node_measures_every_cell_and_the_second_time_finds_them(pair, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    corpus = load_corpus(str(text))
    workload = Workload(corpus=str(text), input_len=8, output_len=2, repeats=2, warmups=0)
    cell = SpeedSpec(model="demo", serving=Serving(enforce_eager=True), workload=workload)
    subjects = {"demo": prepare("demo", cell.serving, workload, corpus)}
    text.unlink()  # it travels through the object store
    watcher, store = Sweeping(), RunStore(tmp_path / "results")
    plan = Plan(store, subjects, 0, "auto", watcher)
    choice = ClusterChoice(pair, gpu_kinds=("alpha", "beta"))
    machine, gpus = survey(choice, watcher)
    assert gpus == 0
    found = run_sweep_on(choice, plan, [cell], corpus)
    assert [len(kind) for kind in found] == [1, 1]
    assert [done for done, _, _ in watcher.cells] == [1, 2]
    for (one,) in found:
        assert one.record.status == "ok", one.record.error
        assert one.path.parent == tmp_path / "results" / "demo"
        assert load_record(one.path) == one.record
        assert one.record.run_id == f"demo/{one.path.name}"
        assert one.record.machine == machine
        assert {"tokens.parquet", "telemetry.parquet"} <= set(one.record.files)
        assert all((one.path / name).is_file() for name in one.record.files)
    assert len({one.path for (one,) in found}) == 2
    again = run_sweep_on(choice, plan, [cell], corpus)
    assert {one.path for (one,) in again} <= {one.path for (one,) in found}
    assert len(watcher.cells) == 2
    with pytest.raises(UsageError, match="of the kind gamma"):
        survey(ClusterChoice(pair, gpu_kinds=("gamma",)), watcher)


class Shelf:
    """A sweep's bookkeeping of GPUs, without a cluster."""

    def __init__(self, *gpus, exclusive=False):
        machine = Machine(platform="", cpu="", cpu_cores=1, ram_bytes=1, python="", packages={})
        benches = [
            Bench(
                read_node(i, {"NodeID": f"n{i}", "NodeManagerAddress": "", "Resources": {"CPU": 8.0, "GPU": float(n)}}),
                machine,
            )
            for i, n in enumerate(gpus)
        ]  # fmt: skip
        self.sweep = Places({None: benches}, exclusive)

    def place(self, gpus, first=0):
        serving = Serving(tensor_parallel_size=gpus, gpus=tuple(range(first, first + gpus)))
        cell = SpeedSpec(model="m", serving=serving, workload=Workload(corpus="builtin"))
        return self.sweep.take(Errand(None, [cell]))


def test_no_two_cells_share_a_gpu():
    shelf = Shelf(2, 1)
    taken = [shelf.place(1) for _ in range(4)]
    assert [place and place.bench.node.id for place in taken] == ["n0", "n0", "n1", None]
    shelf.sweep.give_back(taken[0])
    assert shelf.place(2) is None
    shelf.sweep.give_back(taken[1])
    both = shelf.place(2)
    assert (both.bench.node.id, both.gpus, both.cpus) == ("n0", 2, 1)


def test_a_cell_on_the_second_gpu_takes_both():
    """Ray numbers a task's GPUs from 0, so the second one of a task needs two."""
    assert Shelf(2).place(1, first=1).gpus == 2


def test_an_exclusive_cell_takes_its_whole_node():
    shelf = Shelf(2, 4, exclusive=True)
    first, second = shelf.place(1), shelf.place(1)
    assert [(p.bench.node.id, p.gpus, p.cpus) for p in (first, second)] == [("n0", 2, 8), ("n1", 4, 8)]
    assert shelf.place(1) is None


def test_a_cell_without_gpus_takes_its_whole_node():
    shelf = Shelf(0)
    place = shelf.place(1)
    assert (place.gpus, place.cpus) == (0, 8)
    assert shelf.place(1) is None


def test_a_sweep_without_a_node_that_is_large_enough_ends():
    shelf = Shelf(2)
    with pytest.raises(EngineDied, match="left for 4 GPUs"):
        shelf.place(4)
    shelf.sweep.gone = {"n0"}
    with pytest.raises(EngineDied, match="left for 1 GPUs"):
        shelf.place(1)
