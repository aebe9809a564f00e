"""The nodes of a run: each is looked at once, and then takes part, or is kept out for a reason that is said.

A task on the node reads what it has and fetches the model there. A node that comes late is looked at like any
other; one that has cost several workers one after the other is given up.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from evalsuite.cluster.dispatch import Event
from evalsuite.cluster.inbox import Inbox, reason_of
from evalsuite.cluster.nodes import Node, choose, only_on, read_node, refusal
from evalsuite.cluster.order import Order, Watcher
from evalsuite.cluster.scorer import NodeReport, report_node
from evalsuite.core.record import Machine

MOST_DEATHS = 3  # of a node's workers, one after the other, before it is given up


class Admission:
    """Which nodes may have workers.

    Args:
        ray: the module, connected.
        inbox: where the answers of nodes arrive.
        admitted: is called with each node that may take part.

    Attributes:
        machines: of every node that takes part or took part, by its number.
        refused: why nodes and workers were kept out, for the record.
    """

    def __init__(
        self, ray: Any, order: Order, watcher: Watcher, inbox: Inbox, admitted: Callable[[Node], None]
    ) -> None:
        self._ray, self._order, self._watcher, self._inbox = ray, order, watcher, inbox
        self._then = admitted
        self._nodes: dict[str, Node] = {}
        self._asked: set[str] = set()
        self._deaths: dict[str, int] = {}  # of every node that was looked at
        self._admitted: set[str] = set()
        self.machines: dict[int, Machine] = {}
        self.refused: list[str] = []

    @property
    def undecided(self) -> bool:
        """Whether a node has been asked and has not answered yet."""
        return bool(self._asked)

    def require_fitting(self) -> None:
        """Raises UsageError where no node has room for a worker, or their GPUs are of several kinds."""
        choose(self._alive(), self._order.demand, self._order.gpu_kind)

    def nodes(self) -> list[Node]:
        """Those that are alive and may take part; who has cost the fewest workers of late is first."""
        admitted = [node for node in self._alive() if node.id in self._admitted]
        return sorted(admitted, key=lambda node: self._deaths[node.id])

    def _alive(self) -> list[Node]:
        """All nodes that are alive; new ones get the next numbers."""
        alive = [found for found in self._ray.nodes() if found["Alive"]]
        for found in alive:
            if found["NodeID"] not in self._nodes:
                self._nodes[found["NodeID"]] = read_node(len(self._nodes) + 1, found)
        return [self._nodes[found["NodeID"]] for found in alive]

    def look(self) -> None:
        """Send a task to every node that was not seen before and that has room."""
        for node in self._alive():
            fits = self._order.demand.places(node) and node.is_of(self._order.gpu_kind)
            if node.id in self._deaths or not fits:
                continue
            self._deaths[node.id] = 0
            self._asked.add(node.id)
            task = self._ray.remote(report_node).options(
                num_cpus=0, max_retries=0, scheduling_strategy=only_on(node)
            )
            self._inbox.expect(task.remote(self._order.spec.model), self._reported, node)

    def _reported(self, node: Node, future: Future[Any]) -> Iterable[Event]:
        self._asked.discard(node.id)
        order = self._order
        try:
            report: NodeReport = future.result()
        except self._ray.exceptions.RayError as error:
            self._refuse(node, f"hlwq-eval cannot run there: {reason_of(error)}")
            return ()
        reason = refusal(order.driver, report.machine, report.fingerprint, order.fingerprint)
        if reason is not None:
            self._refuse(node, reason)
            return ()
        self.machines[node.number] = report.machine
        self._admitted.add(node.id)
        self._then(node)
        return ()

    def worked(self, node: Node) -> None:
        """A worker of the node has scored a block."""
        self._deaths[node.id] = 0

    def died(self, node: Node, reason: str) -> None:
        """A worker of the node is gone; the node is kept while it can be trusted."""
        self._deaths[node.id] += 1
        if self._deaths[node.id] >= MOST_DEATHS and node.id in self._admitted:
            self._refuse(node, f"{MOST_DEATHS} of its workers died one after the other: {reason}")

    def refuse_worker(self, worker: str, node: Node, reason: str) -> None:
        """A worker cannot take part, and others on its node would fare no better."""
        self._refuse(node, reason, worker)

    def _refuse(self, node: Node, reason: str, worker: str | None = None) -> None:
        who = worker or f"node {node.number}"
        self._admitted.discard(node.id)
        self.refused.append(f"{who} was refused: {reason}")
        self._watcher.phase(f"{who} ({node.address}) is refused: {reason}")
