"""What a node measures for a sweep, without a cluster: paths of the driver's folder, records under its names."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from run.conftest import Watcher as Sweeping

from evalsuite.cluster import benches
from evalsuite.cluster import speed as cluster_speed
from evalsuite.cluster.benches import survey
from evalsuite.cluster.cells import CellFiles, Ended, Source, measure_group
from evalsuite.cluster.connect import ClusterChoice
from evalsuite.cluster.nodes import read_node
from evalsuite.cluster.places import Bench
from evalsuite.cluster.speed import run_sweep_on
from evalsuite.core.spec import Serving, SpeedSpec, Workload, spec_hash
from evalsuite.data.corpora import load_corpus
from evalsuite.run.speed import Plan
from evalsuite.run.subject import prepare
from evalsuite.store.runs import RunStore
from evalsuite.telemetry.machine import read_machine

NODE = {"NodeID": "n", "NodeManagerAddress": "", "Alive": True, "Resources": {"CPU": 2.0}}


@pytest.fixture
def there(tmp_path, demo_folder, monkeypatch):
    """The driver's folder, with a model and a tokenizer in it; returns a cell that names both from there."""
    place = tmp_path / "driver"
    place.mkdir()
    (place / "mine").symlink_to(demo_folder)
    (place / "tokens.json").symlink_to(demo_folder / "tokenizer.json")
    monkeypatch.chdir(place)
    return SpeedSpec(
        model="./mine", serving=Serving(enforce_eager=True),
        workload=Workload(
            corpus="builtin", tokenizer="tokens.json", input_len=8, output_len=2, repeats=1, warmups=0
        ),
    )  # fmt: skip


class Tasks:
    """As much of Ray as starting a task takes; keeps what a task was given."""

    def __init__(self):
        self.given = []

    def nodes(self):
        return [NODE]

    def put(self, what):
        return what

    def remote(self, function):
        def start(*arguments):
            self.given.append(arguments)

        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=start))


def test_relative_paths_are_the_drivers_and_the_record_keeps_them_as_typed(there, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_speed, "only_on", lambda node: None)
    corpus, ray = load_corpus("builtin"), Tasks()
    subjects = {there.model: prepare(there.model, there.serving, there.workload, corpus)}
    plan = Plan(RunStore(tmp_path / "results"), subjects, 0, "auto", Sweeping())
    node = read_node(1, NODE)
    sweep = cluster_speed._Sweep(ray, {None: [Bench(node, read_machine())]}, False, plan, [there], corpus)
    sweep._waiting.append(cluster_speed.Errand(None, [there]))
    sweep._start()
    ((group, given, source, seed, threads),) = ray.given
    assert source == Source(
        str(tmp_path / "driver" / "mine"), str(tmp_path / "driver" / "tokens.json"),
        subjects[there.model].fingerprint,
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)  # a node's folder
    *news, end = measure_group(group, given, source, seed, threads)
    assert end == Ended(None)
    (files,) = [found.files for found in news if isinstance(found, CellFiles)]
    record = json.loads(files["run.json"])
    assert (record["status"], record["error"]) == ("ok", None)
    assert (record["spec"]["model"], record["spec"]["workload"]["tokenizer"]) == ("./mine", "tokens.json")
    assert record["spec_hash"] == spec_hash(there)


def test_a_sweep_says_once_to_whom_it_connects_and_who_else_can(tmp_path, monkeypatch):
    monkeypatch.setattr(benches, "connected", lambda address: nullcontext(Tasks()))
    monkeypatch.setattr(
        benches,
        "admitted",
        lambda ray, nodes, progress, like: [Bench(node, read_machine()) for node in nodes],
    )
    watcher, choice = Sweeping(), ClusterChoice("10.0.0.1:6379")
    survey(choice, watcher)
    plan = Plan(RunStore(tmp_path), {}, 0, "auto", watcher)
    assert run_sweep_on(choice, plan, [], load_corpus("builtin")) == [[]]
    note, connecting = watcher.phases
    assert "whoever reaches it can run code as you" in note
    assert connecting == "connecting to the cluster at 10.0.0.1:6379"
