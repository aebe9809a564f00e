"""One worker as Ray has it: an actor with GPUs of its own, placed as a group where several share a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evalsuite.cluster.nodes import ID_LABEL, Demand, Node, only_on
from evalsuite.cluster.order import Order
from evalsuite.cluster.scorer import Opened, ScoringWorker

MOST_NAMED = 8  # workers in one message


@dataclass
class Member:
    """A worker, waiting for its place, loading or loaded.

    Attributes:
        asked_s, started_s: when Ray was asked for it, and gave it its place.
        said: that it takes long to load.
    """

    name: str
    node: Node
    actor: Any
    group: Any
    asked_s: float
    started_s: float | None = None
    said: bool = False
    opened: Opened | None = None

    def loads_s(self, now_s: float) -> float:
        """For how long it has been loading; 0 before and after."""
        return 0.0 if self.started_s is None or self.opened is not None else now_s - self.started_s

    def end(self, ray: Any) -> None:
        """End it at once, whatever it does."""
        ray.kill(self.actor, no_restart=True)
        if self.group is not None:
            from ray.util.placement_group import remove_placement_group

            remove_placement_group(self.group)


def start_member(ray: Any, order: Order, name: str, node: Node, now_s: float) -> Member:
    """Ask Ray for a worker on this node."""
    strategy, group = only_on(node), None
    if order.demand.gpus > 1:
        strategy, group = _reserve(order.demand, node)
    actor = (
        ray.remote(ScoringWorker)
        .options(
            num_cpus=order.demand.cpus,
            num_gpus=order.demand.gpus,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=strategy,
        )
        .remote(order.spec, order.threads)
    )
    return Member(name, node, actor, group, now_s)


def _reserve(demand: Demand, node: Node) -> tuple[Any, Any]:
    """The GPUs of a tensor-parallel engine, all of one node, kept for it."""
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = placement_group(
        [{"CPU": demand.cpus, "GPU": float(demand.gpus)}],
        strategy="STRICT_PACK",
        bundle_label_selector=[{ID_LABEL: node.id}],
    )
    return PlacementGroupSchedulingStrategy(group, 0), group


def names(members: Sequence[Member]) -> str:
    """Of workers and their nodes, not more than one can read."""
    shown = [f"{member.name} ({member.node.address})" for member in members[:MOST_NAMED]]
    more = len(members) - len(shown)
    return ", ".join(shown) + f" and {more} more" * bool(more)
