"""The workers of a run, with as much of Ray as a script takes: who is started where, and what is said of it."""

import time
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest

from cluster.conftest import Watcher, small_spec
from evalsuite.cluster.blocks import Block
from evalsuite.cluster.dispatch import BlockScores, Joined
from evalsuite.cluster.member import names
from evalsuite.cluster.nodes import Demand
from evalsuite.cluster.order import Order
from evalsuite.cluster.pool import RayPool
from evalsuite.cluster.scorer import NodeReport, Opened, report_node
from evalsuite.core.errors import EngineDied, ModelError
from evalsuite.engines.scorers import ScorerChoice
from evalsuite.telemetry.machine import read_machine

ray_errors = pytest.importorskip("ray").exceptions
MACHINE = read_machine()


class Ref:
    """An answer; None is one that never comes."""

    def __init__(self, value):
        self.value, self._future = value, Future()
        if value is not None:
            self._future.set_result(value)

    def future(self):
        return self._future


def method(answer):
    return SimpleNamespace(remote=lambda *arguments: Ref(answer()))


class ScriptedRay:
    """Nodes of one CPU each, named a to f; `opened` is what a worker on a node answers, on `busy` none starts.

    The output head of a worker on c never comes.
    """

    exceptions = ray_errors

    def __init__(self, nodes, opened, busy=()):
        self._nodes, self._opened, self.busy, self.killed = nodes, opened, set(busy), 0
        self.answers = []  # of blocks

    def nodes(self):
        return [
            {"NodeID": name * 56, "NodeManagerAddress": name, "Alive": True, "Resources": {"CPU": 1.0}}
            for name in self._nodes
        ]

    def available_resources(self):
        return {"CPU": float(len(self._nodes) - len(self.busy)), "node:a": 1.0}

    def put(self, what):
        return what

    def kill(self, actor, no_restart):
        self.killed += 1

    def get(self, ref, timeout=None):
        if ref.value is None:
            assert timeout is not None, "it waits forever"
            raise ray_errors.GetTimeoutError
        return ref.value

    def remote(self, what):
        if what is report_node:
            return SimpleNamespace(options=lambda **options: method(lambda: NodeReport(MACHINE, "same")))
        return SimpleNamespace(
            options=lambda scheduling_strategy, **options: SimpleNamespace(
                remote=lambda *arguments: self._actor(scheduling_strategy.node_id[0])
            )
        )

    def _actor(self, node):
        def answer(value):
            return method(lambda: None if node in self.busy else value)

        found = self._opened(node)

        def score():
            self.answers.append(Ref(None))
            return self.answers[-1]

        return SimpleNamespace(
            __ray_ready__=answer(True), open=answer(found), head=answer(None if node == "c" else b"head"),
            score=SimpleNamespace(remote=lambda block: score()),
        )  # fmt: skip


def loaded(node):
    facts = SimpleNamespace(device_name="cpu", computed="float32")
    return Opened(facts, ScorerChoice("torch", "", {}), 0.1, None)


class Clock:
    """Goes only when it is told to."""

    now_s = 0.0

    def __call__(self):
        return self.now_s


def pool(ray, clock=time.monotonic, **changes):
    order = Order(
        spec=small_spec(), ids=np.zeros(4, np.int64), window_bos=None, fingerprint="same", threads=1,
        driver=MACHINE, demand=Demand(1.0, 0), **changes,
    )  # fmt: skip
    watcher = Watcher()
    return RayPool(ray, order, watcher, look_s=0.01, wait_s=0.05, clock=clock), watcher


def turns(made, count=20):
    return [event for _ in range(count) for event in made.events()]


def test_a_worker_that_cannot_load_makes_room_for_one_on_another_node():
    made, _ = pool(
        ScriptedRay("ab", lambda node: ModelError("It is broken.") if node == "a" else loaded(node)),
        workers=1,
    )
    joined, _ = made.first()
    assert joined == ["worker 2 on node 2"]
    assert made.admission.refused == ["worker 1 on node 1 was refused: It is broken."]


def test_where_no_worker_can_load_every_node_is_tried_and_the_reason_is_raised():
    made, _ = pool(ScriptedRay("ab", lambda node: ModelError(f"{node} is broken.")), workers=1)
    with pytest.raises(ModelError, match="is broken"):
        made.first()
    assert len(made.admission.refused) == 2


def test_who_waits_for_others_says_so_once_and_is_not_said_to_load():
    ray = ScriptedRay("ab", loaded, busy="ab")
    made, watcher = pool(ray)
    assert turns(made) == []
    assert watcher.phases == [
        "2 workers have not started: each needs 1 CPUs on its node, and the whole cluster has 0 CPUs free; "
        "what others hold is waited for"
    ]


def test_a_node_is_said_to_load_once_its_first_worker_has_started():
    made, watcher = pool(ScriptedRay("a", loaded))
    assert Joined("worker 1 on node 1") in turns(made)
    assert watcher.phases == [f"node 1 (a): {MACHINE.cpu}: loading"]


def test_a_worker_that_stopped_answering_is_not_waited_for_at_the_end():
    made, _ = pool(ScriptedRay("cb", loaded))
    assert len(turns(made)) == 2
    assert made.head() == b"head"
    alone, _ = pool(ScriptedRay("c", loaded))
    turns(alone)
    with pytest.raises(EngineDied, match="No worker is left to write"):
        alone.head()


def test_a_replaced_worker_is_killed_and_what_it_answers_late_is_nobodys():
    ray = ScriptedRay("ab", loaded)
    made, watcher = pool(ray, workers=1)
    (one,), _ = made.first()
    block = Block(0, 2, 2)
    made.submit(one, block)
    made.replace(one, "it did not answer")
    assert ray.killed == 1
    assert watcher.phases[-1] == "worker 1 on node 1 is gone: it did not answer"
    assert turns(made) == [Joined("worker 2 on node 2")], "on the node that has lost none"
    ray.answers[0].future().set_result(BlockScores((0.0, 0.0)))
    assert turns(made) == []
    made.submit("worker 2 on node 2", block)
    ray.answers[1].future().set_result(BlockScores((0.0, 0.0)))
    assert [event.worker for event in turns(made)] == ["worker 2 on node 2"]


def test_a_node_whose_workers_are_stuck_one_after_the_other_is_given_up():
    ray = ScriptedRay("a", loaded)
    made, watcher = pool(ray)
    for number in range(1, 4):
        assert turns(made) == [Joined(f"worker {number} on node 1")]
        made.replace(f"worker {number} on node 1", "it did not answer")
    assert watcher.phases[-1].startswith("node 1 (a) is refused: 3 of its workers died one after the other")
    assert turns(made) == []


def test_silence_is_said_with_names_and_nodes_and_what_can_be_done():
    made, watcher = pool(ScriptedRay("ab", loaded))
    turns(made)
    made.silent(("worker 1 on node 1", "worker 2 on node 2"), 300.0, 600.0)
    made.silent(("worker 1 on node 1",), 900.0, None)
    leave = "Ctrl-C ends the run, and the same command goes on from what is written."
    assert watcher.warnings == [
        "No worker has answered for 5 min 00 s. Blocks are with worker 1 on node 1 (a), worker 2 on node 2 (b). "
        f"A worker that has one for 10 min 00 s is ended, and another takes its place. {leave}",
        "No worker has answered for 15 min 00 s. Blocks are with worker 1 on node 1 (a). No block has come back "
        f"yet, so slow cannot be told from stuck, and they are left to work. {leave}",
    ]


def test_of_many_workers_some_are_named():
    members = [SimpleNamespace(name=f"worker {i}", node=SimpleNamespace(address=f"n{i}")) for i in range(12)]
    assert names(members).endswith("worker 6 (n6), worker 7 (n7) and 4 more")
    assert names(members[:2]) == "worker 0 (n0), worker 1 (n1)"


def test_a_worker_that_loads_for_long_is_named_once_and_left_to_load():
    clock, ray = Clock(), ScriptedRay("ab", lambda node: None if node == "b" else loaded(node))
    made, watcher = pool(ray, clock)
    assert turns(made) == [Joined("worker 1 on node 1")]
    for _ in range(100):
        clock.now_s += 10.0
        assert list(made.events()) == []
    (said,) = watcher.warnings
    assert said.startswith("Still loading the model after 15 min 00 s: worker 2 on node 2 (b). Ctrl-C")
    assert ray.killed == 0


def test_a_driver_that_was_stopped_has_not_waited():
    clock = Clock()
    made, _ = pool(ScriptedRay("a", loaded), clock)
    clock.now_s += 3.0
    assert made.now_s() == 3.0
    clock.now_s += 3600.0
    assert made.now_s() == 13.0
