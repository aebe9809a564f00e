"""What becomes of a sweep when tasks, nodes and models fail: the sweep itself, on nodes that follow a script."""

import os
from types import SimpleNamespace

import pytest
from run.conftest import Watcher as Sweeping

from evalsuite.cluster import benches, speed
from evalsuite.cluster.cells import CellFiles, Ended, Said, Source, measure_group
from evalsuite.cluster.connect import ClusterChoice
from evalsuite.cluster.scorer import NodeReport
from evalsuite.core.errors import EngineDied, ModelError, StorageError
from evalsuite.core.record import Gpu, Machine, Record
from evalsuite.core.spec import Serving, SpeedSpec, Workload, spec_hash
from evalsuite.data.corpora import Corpus
from evalsuite.run.speed import Plan
from evalsuite.store.runs import RunStore, load_record, utc_now

H100 = Gpu(name="H100", memory_bytes=80 * 10**9)
MACHINE = Machine(platform="", cpu="epyc", cpu_cores=8, ram_bytes=1, python="", packages={})


class Lost(Exception):
    """Stands for whatever Ray raises."""


class Stub:
    """As much of the module ray as a sweep uses; each task is a list of what it will send.

    Args:
        script: what the tasks of a node do, one after the other; the last one again and again. Each is
            called with the cells of its group and returns what it sends.
    """

    exceptions = SimpleNamespace(RayError=Lost)

    def __init__(self):
        self.alive, self.script, self.machines, self.began, self.cancelled = [], {}, {}, [], []
        self._turn = -1

    def add(self, name, *script, gpus=0, machine=MACHINE, kinds=()):
        self.alive.append(
            {
                "NodeID": name, "NodeManagerAddress": name, "Alive": True,
                "Resources": {"CPU": 8.0, **({"GPU": float(gpus)} if gpus else {}), **dict.fromkeys(kinds, 1.0)},
            }
        )  # fmt: skip
        self.script[name] = list(script)
        self.machines[name] = machine

    def nodes(self):
        return self.alive

    def put(self, value):
        return value

    def remote(self, function):
        def options(*, scheduling_strategy, **_):
            return SimpleNamespace(remote=lambda *given: self._begin(function, scheduling_strategy, given))

        return SimpleNamespace(options=options)

    def _begin(self, function, node, given):
        if function is benches.report_node:
            return NodeReport(self.machines[node], "")
        self.began.append(node)
        script = self.script[node]
        does = script.pop(0) if len(script) > 1 else script[0]
        return iter(does(list(given[0])))

    def wait(self, refs, *, num_returns, timeout, fetch_local):
        """The tasks send one piece of news each, in turn."""
        self._turn += 1
        return [refs[self._turn % len(refs)]], []

    def get(self, ref):
        if isinstance(ref, Lost):
            raise ref
        return ref

    def cancel(self, answers, *, force):
        self.cancelled.append(answers)


@pytest.fixture
def ray(monkeypatch):
    stub = Stub()

    class Connected:
        def __enter__(self):
            return stub

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(benches, "connected", lambda _: Connected())
    monkeypatch.setattr(benches, "resolve", lambda address: address)
    for user in (benches, speed):
        monkeypatch.setattr(user, "only_on", lambda node: node.id)
    monkeypatch.setattr(benches, "read_machine", lambda: MACHINE)
    monkeypatch.setattr(speed, "LOOK_S", 0.0)
    monkeypatch.setattr(speed.time, "sleep", lambda _: None)
    return stub


def cells(*models):
    return [
        SpeedSpec(model=model, serving=Serving(), workload=Workload(corpus="builtin", input_len=length))
        for model in models
        for length in (8, 16)
    ]


def files(cell):
    """A cell that was measured."""
    record = Record(
        run_id="m/there", kind="speed", status="failed", started=utc_now(), finished=utc_now(),
        spec=cell.model_dump(mode="json"), spec_hash=spec_hash(cell), machine=MACHINE, error="by script",
        warnings=("its own",),
    )  # fmt: skip
    return CellFiles({"run.json": record.model_dump_json().encode()})


def measures(group):
    return [Said("measuring"), *map(files, group), Ended(None)]


def breaks_off(group):
    """One cell comes home, and then the task is gone."""
    return [files(group[0]), Lost("the worker died")]


def refuses(error):
    return lambda _: [Ended(error)]


def sweep(folder, chosen, kinds=(), *, exclusive=False):
    watcher = Sweeping()
    subjects = {cell.model: SimpleNamespace(fingerprint="f") for cell in chosen}
    plan = Plan(RunStore(folder), subjects, 0, "fresh", watcher)
    choice = ClusterChoice("127.0.0.1:1", gpu_kinds=kinds, exclusive=exclusive)
    found = speed.run_sweep_on(choice, plan, chosen, Corpus("c", "s", ()))
    for kind in found:
        assert [one.record.spec_hash for one in kind] == [spec_hash(cell) for cell in chosen]
        assert all(load_record(one.path) == one.record for one in kind)
    assert len(list(folder.glob("*/*/run.json"))) == sum(map(len, found)), "each cell is kept once"
    return found, watcher


def test_a_node_that_cannot_measure_is_taken_out_and_another_does_its_cells(ray, tmp_path):
    ray.add("bad", refuses(ModelError("The weights on this node have the fingerprint 0.")))
    ray.add("good", measures)
    _, watcher = sweep(tmp_path, cells("m", "n"))
    assert ray.began.count("bad") == 1
    assert "node 1 (bad) is refused: The weights on this node have the fingerprint 0." in watcher.phases
    assert not ray.cancelled
    assert [done for done, _, _ in watcher.cells] == [1, 2, 3, 4]


def test_what_a_node_sent_before_its_disk_was_full_is_not_measured_again(ray, tmp_path):
    ray.add("bad", lambda group: [files(group[0]), Ended(StorageError("The disk is full."))])
    ray.add("good", measures)
    _, watcher = sweep(tmp_path, cells("m"))
    assert ray.began == ["bad", "good"]
    assert len(watcher.cells) == 2


def test_an_error_on_the_last_node_of_a_kind_ends_the_sweep_with_its_cause(ray, tmp_path):
    ray.add("first", refuses(ModelError("There is no model m.", cause="why", todo="what")), kinds=("a",))
    ray.add("second", refuses(ModelError("There is no model m.", cause="why", todo="what")), kinds=("a",))
    ray.add("other", measures, kinds=("b",))
    with pytest.raises(ModelError, match=r"node 2 \(second\): There is no model m") as raised:
        sweep(tmp_path, cells("m"), ("a", "b"))
    assert (raised.value.cause, raised.value.todo) == ("why", "what")
    assert ray.began.count("first") == 1


def test_a_lost_task_is_begun_again_without_the_cells_that_came_home(ray, tmp_path):
    groups = []

    def noting(group):
        groups.append(len(group))
        return (breaks_off if len(groups) == 1 else measures)(group)

    ray.add("one", noting)
    _, watcher = sweep(tmp_path, cells("m"))
    assert groups == [2, 1]
    assert "node 1 (one) lost its cells: the worker died" in watcher.phases


def test_cells_of_a_dead_node_go_to_another(ray, tmp_path):
    def dies(group):
        yield files(group[0])
        ray.alive = [node for node in ray.alive if node["NodeID"] != "dead"]
        yield Lost("the node died")

    ray.add("dead", dies)
    ray.add("good", measures)
    sweep(tmp_path, cells("m"))
    assert ray.began == ["dead", "good"]


def test_a_node_once_refused_stays_out_when_another_dies(ray, tmp_path):
    """Both lists are one: a look at who is alive must not let the refused one in again."""
    ray.add("bad", refuses(ModelError("The weights differ.")))
    ray.add("shaky", breaks_off, measures)
    sweep(tmp_path, cells("m"))
    assert ray.began == ["bad", "shaky", "shaky"]


def test_a_group_that_ends_every_task_ends_the_sweep(ray, tmp_path):
    ray.add("one", lambda _: [Lost("the worker died")])
    with pytest.raises(EngineDied, match="ended 3 tasks"):
        sweep(tmp_path, cells("m"))
    assert len(ray.began) == 3


def test_a_node_that_comes_late_takes_what_waits(ray, tmp_path):
    def slow(group):
        ray.add("late", measures)
        yield from [Said("measuring")] * 20
        yield from measures(group)

    ray.add("slow", slow)
    sweep(tmp_path, cells("m", "n"))
    assert sorted(ray.began) == ["late", "slow"]


@pytest.mark.parametrize(
    ("machines", "said"),
    [
        (({"gpus": (H100,)}, {"gpus": (H100.model_copy(update={"name": "A100"}),)}), "it has A100 with 80"),
        (({"gpus": (H100,)}, {"gpus": (H100.model_copy(update={"memory_bytes": 10**9}),)}), "it has H100 with 1"),
        (({"gpus": (H100,), "gpu_driver": "570"}, {"gpus": (H100,), "gpu_driver": "580"}), "GPU driver is 580"),
        (({}, {"cpu": "xeon"}), "its processor is xeon, and that of the first node epyc"),
    ],
)  # fmt: skip
def test_a_node_unlike_the_first_of_its_kind_is_refused_by_name(ray, tmp_path, machines, said):
    for number, changes in enumerate(machines):
        machine = MACHINE.model_copy(update=changes)
        ray.add(f"n{number}", measures, gpus=len(machine.gpus), machine=machine, kinds=("h100",))
    _, watcher = sweep(tmp_path, cells("m", "n", "o"), ("h100",))
    (refused,) = [phase for phase in watcher.phases if "refused" in phase]
    assert refused.startswith("node 2 (n1) is refused: ")
    assert said in refused
    assert set(ray.began) == {"n0"}


def test_nodes_with_more_of_the_same_gpu_measure_too(ray, tmp_path):
    ray.add("n0", measures, gpus=1, machine=MACHINE.model_copy(update={"gpus": (H100,)}))
    ray.add("n1", measures, gpus=2, machine=MACHINE.model_copy(update={"gpus": (H100, H100)}))
    _, watcher = sweep(tmp_path, cells("m", "n"))
    assert set(ray.began) == {"n0", "n1"}
    assert not any("refused" in phase for phase in watcher.phases)


def test_a_late_node_unlike_the_first_is_refused(ray, tmp_path):
    def slow(group):
        ray.add("late", measures, machine=MACHINE.model_copy(update={"cpu": "xeon"}))
        yield from [Said("measuring")] * 20
        yield from measures(group)

    ray.add("slow", slow, measures)
    _, watcher = sweep(tmp_path, cells("m", "n"))
    assert set(ray.began) == {"slow"}
    assert any("late) is refused: its processor" in phase for phase in watcher.phases)


def test_cells_timed_side_by_side_on_one_node_say_so(ray, tmp_path):
    two = MACHINE.model_copy(update={"gpus": (H100, H100)})
    ray.add("n0", measures, gpus=2, machine=two)
    found, _ = sweep(tmp_path, cells("m", "n"))
    note = "another GPU of its node was measured at the same time"
    assert all(one.record.warnings == ("its own", note) for one in found[0])
    assert all(one.record.beside == 1 for one in found[0])


def test_a_cell_that_began_after_its_neighbour_ended_says_nothing(ray, tmp_path):
    two = MACHINE.model_copy(update={"gpus": (H100, H100)})

    def long(group):
        return [Said("measuring")] * 10 + measures(group)[1:]

    ray.add("n0", lambda group: [*map(files, group), Ended(None)], long, gpus=2, machine=two)
    found, _ = sweep(tmp_path, cells("m", "n"))
    noted = [len(one.record.warnings) == 2 for one in found[0]]
    assert sorted(noted) == [False, True, True, True]


def test_whole_nodes_have_nobody_beside(ray, tmp_path):
    two = MACHINE.model_copy(update={"gpus": (H100, H100)})
    ray.add("n0", measures, gpus=2, machine=two)
    found, _ = sweep(tmp_path, cells("m", "n"), exclusive=True)
    assert all(one.record.warnings == ("its own",) for one in found[0])


@pytest.mark.parametrize("threads", [None, "3"])
def test_a_cell_runs_with_the_threads_of_the_driver(monkeypatch, threads):
    """Ray gives a task one thread for each of its CPUs."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    seen = []
    monkeypatch.setattr(
        "evalsuite.cluster.cells._measure", lambda *_: seen.append(os.environ.get("OMP_NUM_THREADS"))
    )
    assert list(measure_group(cells("m"), Corpus("c", "s", ()), Source("m", None, "f"), 0, threads)) == [
        Ended(None)
    ]
    assert seen == [threads]
