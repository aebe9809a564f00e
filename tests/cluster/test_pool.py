"""The workers of a run, with as much of Ray as a script takes: who is started where, and what is said of it."""

from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest

from cluster.conftest import Watcher, small_spec
from evalsuite.cluster.dispatch import Joined
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
        return SimpleNamespace(
            __ray_ready__=answer(True), open=answer(found), head=answer(None if node == "c" else b"head")
        )


def loaded(node):
    facts = SimpleNamespace(device_name="cpu", computed="float32")
    return Opened(facts, ScorerChoice("torch", "", {}), 0.1, None)


def pool(ray, **changes):
    order = Order(
        spec=small_spec(), ids=np.zeros(4, np.int64), window_bos=None, fingerprint="same", threads=1,
        driver=MACHINE, demand=Demand(1.0, 0), **changes,
    )  # fmt: skip
    watcher = Watcher()
    return RayPool(ray, order, watcher, look_s=0.01, wait_s=0.05), watcher


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
