"""Which nodes of a cluster may take part, and why others may not. It reads what Ray reports; it asks nothing.

A number must not depend on which node it came from: every node needs the driver's library versions and the
driver's weights, and all of them the same GPU.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from evalsuite.core.errors import EvalError, UsageError
from evalsuite.core.record import Machine

KIND_LABEL, ID_LABEL = "ray.io/accelerator-type", "ray.io/node-id"
KIND_PREFIX = "accelerator_type:"
RAY_OWN = ("CPU", "GPU", "memory", "object_store_memory")


@dataclass(frozen=True)
class Node:
    """One node as Ray reports it.

    Attributes:
        number: in the order in which nodes were seen, from 1.
        address: for messages; records hold the number alone.
        kinds: what its GPUs are called: Ray's own name, custom resources and labels, in lower case.
    """

    number: int
    id: str
    address: str
    cpus: float
    gpus: int
    kinds: frozenset[str]
    accelerator: str | None

    @property
    def name(self) -> str:
        return f"node {self.number} ({self.address})"

    def is_of(self, kind: str | None) -> bool:
        """Whether it is of this kind; of None, every node is."""
        return kind is None or kind.lower() in self.kinds


@dataclass(frozen=True)
class Demand:
    """What one worker needs for itself."""

    cpus: float
    gpus: int

    def places(self, node: Node) -> int:
        """How many such workers a node has room for."""
        room = int(node.cpus // self.cpus)
        return min(room, node.gpus // self.gpus) if self.gpus else room


def read_node(number: int, found: dict[str, Any]) -> Node:
    """One entry of ``ray.nodes()``."""
    resources: dict[str, float] = found["Resources"]
    labels: dict[str, str] = found.get("Labels") or {}
    named = [name for name in resources if name not in RAY_OWN and not name.startswith("node:")]
    kinds = [name.removeprefix(KIND_PREFIX) for name in named]
    kinds += [value for label, value in labels.items() if label != ID_LABEL]
    accelerator = labels.get(KIND_LABEL) or next(
        (name.removeprefix(KIND_PREFIX) for name in named if name.startswith(KIND_PREFIX)), None
    )
    return Node(
        number=number,
        id=found["NodeID"],
        address=found["NodeManagerAddress"],
        cpus=resources.get("CPU", 0.0),
        gpus=int(resources.get("GPU", 0)),
        kinds=frozenset(kind.lower() for kind in kinds),
        accelerator=accelerator,
    )


def only_on(node: Node) -> Any:
    """Ray's scheduling strategy for what runs on this node or not at all."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node.id, soft=False)


def choose(nodes: Sequence[Node], demand: Demand, kind: str | None) -> list[Node]:
    """The nodes that have room for a worker.

    Args:
        kind: of GPU, as Ray, a custom resource or a label names it.

    Raises:
        UsageError: there is none; or their GPUs are of several kinds, and none was chosen.
    """
    fitting = [node for node in nodes if demand.places(node) and node.is_of(kind)]
    if not fitting:
        wanted = f"{demand.gpus} GPUs" if demand.gpus else f"{demand.cpus:g} CPUs"
        known = sorted({name for node in nodes for name in node.kinds})
        raise UsageError(
            f"No node of the cluster has {wanted}{f' of the kind {kind}' if kind else ''}.",
            cause=f"it has {'; '.join(_offer(node) for node in nodes)}.",
            todo=f"choose among {', '.join(known)}." if kind and known else "add a node that has.",
        )
    several = sorted({node.accelerator for node in fitting if demand.gpus and node.accelerator})
    if kind is None and len(several) > 1:
        raise UsageError(
            f"The cluster has GPUs of several kinds: {', '.join(several)}.",
            cause="rounding differs between them, so one number cannot come from both.",
            todo=f"choose one: --gpu-kind {several[0]}.",
        )
    return fitting


def _offer(node: Node) -> str:
    return f"{node.name}: {node.cpus:g} CPUs, {node.gpus} GPUs"


def refusal(driver: Machine, machine: Machine, fingerprint: str | EvalError, expected: str) -> str | None:
    """Why a node must not take part; None where it may.

    Args:
        driver, machine: the driver's machine and the node's.
        fingerprint, expected: of the node's copy of the model, and of the driver's.
    """
    different = list(_versions(driver, machine))
    if different:
        return f"it has {', '.join(different)}"
    if isinstance(fingerprint, EvalError):
        return f"the model is not there: {fingerprint.what}"
    if fingerprint != expected:
        return "its copy of the model has other weights"
    return None


def _versions(driver: Machine, machine: Machine) -> Iterable[str]:
    for name in sorted(driver.packages.keys() | machine.packages.keys()):
        here, there = driver.packages.get(name), machine.packages.get(name)
        if here != there:
            yield f"{name} {there or 'missing'}, not {here or 'missing'}"
    commits = driver.git_commit, machine.git_commit
    if None not in commits and commits[0] != commits[1]:
        yield f"hlwq-eval at commit {(machine.git_commit or '')[:12]}, not {(driver.git_commit or '')[:12]}"
