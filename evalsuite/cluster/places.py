"""Which node and which of its GPUs a group of cells takes. It knows no Ray."""

from collections import Counter
from dataclasses import dataclass

from evalsuite.cluster.nodes import Node
from evalsuite.core.errors import EngineDied
from evalsuite.core.record import Machine
from evalsuite.core.spec import SpeedSpec


@dataclass(frozen=True)
class Bench:
    """A node that takes part."""

    node: Node
    machine: Machine


@dataclass
class Errand:
    """A group of cells for one kind of GPU, and what is still to be measured of it."""

    kind: str | None
    cells: list[SpeedSpec]
    losses: int = 0


@dataclass(frozen=True)
class Place:
    """What an errand takes of a node."""

    bench: Bench
    gpus: int
    cpus: float


Benches = dict[str | None, list[Bench]]


class Places:
    """Which GPUs of which node are taken. Ray keeps others away from them; this keeps errands in order.

    Args:
        exclusive: an errand takes its whole node; without GPUs it always does.

    Attributes:
        gone: ids of nodes that are not there any more, or cannot measure.
    """

    def __init__(self, benches: Benches, exclusive: bool) -> None:
        self._benches, self._exclusive = benches, exclusive
        self._taken: Counter[str] = Counter()  # GPUs of each node; a node without any counts as one
        self.gone: set[str] = set()

    def take(self, errand: Errand) -> Place | None:
        """Room on the first node that has it; None while there is none.

        Raises:
            EngineDied: no node of its kind is large enough, or is left.
        """
        needed, fitting = _needed(errand), self.left_for(errand)
        if not fitting:
            raise EngineDied(
                f"No node {f'of the kind {errand.kind} ' if errand.kind else ''}is left for {needed} GPUs.",
                todo="start nodes and run the same command again; what is measured is kept.",
            )
        for bench in fitting:
            node = bench.node
            whole = self._exclusive or not node.gpus
            gpus = node.gpus if whole else needed
            if self._taken[node.id] + max(1, gpus) <= max(1, node.gpus):
                self._taken[node.id] += max(1, gpus)
                return Place(bench, gpus, node.cpus if whole else 1.0)
        return None

    def left_for(self, errand: Errand) -> list[Bench]:
        """The nodes of its kind that are there and large enough, free or not."""
        needed = _needed(errand)
        left = [bench for bench in self._benches[errand.kind] if bench.node.id not in self.gone]
        return [bench for bench in left if not bench.node.gpus or bench.node.gpus >= needed]

    def give_back(self, place: Place) -> None:
        self._taken[place.bench.node.id] -= max(1, place.gpus)


def _needed(errand: Errand) -> int:
    """GPUs of the task: Ray numbers them from 0, so the second one alone takes two."""
    serving = errand.cells[0].serving
    return max((gpu + 1 for gpu in serving.gpus), default=serving.tensor_parallel_size)
