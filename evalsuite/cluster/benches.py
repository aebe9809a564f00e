"""The nodes of a sweep: which may take part, and why others may not.

Every node needs the driver's library versions, and all of a kind the same device: cells of one kind are
compared with one another.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from evalsuite.cluster.connect import ClusterChoice, connected, open_to_others, resolve
from evalsuite.cluster.nodes import Demand, Node, choose, only_on, read_node, refusal
from evalsuite.cluster.places import Bench, Benches
from evalsuite.cluster.scorer import NodeReport, report_node
from evalsuite.core.errors import UsageError, first_line
from evalsuite.core.record import Gpu, Machine
from evalsuite.core.units import si_bytes
from evalsuite.run.speed import SweepProgress
from evalsuite.telemetry.machine import read_machine


def survey(choice: ClusterChoice, progress: SweepProgress) -> tuple[Machine, int]:
    """The machine of the first node that may take part, and how many GPUs each of them has at least.

    A sweep begins with it, so it says to whom it connects and who else can.

    Raises:
        UsageError: no cluster answers, or no node of a kind may take part.
    """
    address = resolve(choice.address)
    if note := open_to_others(address):
        progress.phase(note)
    progress.phase(f"connecting to the cluster at {address}")
    with connected_benches(choice, progress) as (_, benches):
        every = [bench for found in benches.values() for bench in found]
        return every[0].machine, min(bench.node.gpus for bench in every)


@contextmanager
def connected_benches(choice: ClusterChoice, progress: SweepProgress) -> Iterator[tuple[Any, Benches]]:
    """The connection, and the nodes of each kind."""
    with connected(resolve(choice.address)) as ray:
        nodes = [read_node(i, n) for i, n in enumerate((n for n in ray.nodes() if n["Alive"]), 1)]
        demand = Demand(1.0, 1 if any(node.gpus for node in nodes) else 0)
        benches: Benches = {}
        for kind in choice.gpu_kinds or (None,):
            benches[kind] = admitted(ray, choose(nodes, demand, kind), progress, None)
            if not benches[kind]:
                raise UsageError(
                    f"No node {f'of the kind {kind} ' if kind else ''}may take part.",
                    todo="install the driver's versions there; the reasons stand above.",
                )
        yield ray, benches


def admitted(ray: Any, nodes: Sequence[Node], progress: SweepProgress, like: Machine | None) -> list[Bench]:
    """Those whose library versions are the driver's and whose device is that of `like`.

    Args:
        like: the first node of the kind; None takes the first that is admitted.
    """
    driver, found = read_machine(), list[Bench]()
    task = ray.remote(report_node)
    tasks = [
        (node, task.options(num_cpus=0, max_retries=0, scheduling_strategy=only_on(node)).remote(None))
        for node in nodes
    ]
    for node, ref in tasks:
        try:
            report: NodeReport = ray.get(ref)
            reason = refusal(driver, report.machine, "", "") or (like and _unlike(like, report.machine))
        except ray.exceptions.RayError as error:
            progress.phase(f"{node.name} is refused: hlwq-eval cannot run there: {first_line(error)}")
            continue
        if reason is not None:
            progress.phase(f"{node.name} is refused: {reason}")
            continue
        like = like or report.machine
        found.append(Bench(node, report.machine))
    return found


def _unlike(first: Machine, machine: Machine) -> str | None:
    """How a node's device differs from that of the first node of its kind; how many it has does not count."""
    if machine.gpus or first.gpus:
        there, here = (", ".join(sorted({_device(gpu) for gpu in m.gpus})) for m in (first, machine))
        if here != there:
            return f"it has {here or 'no GPU'}, and the first node of its kind {there or 'none'}"
        if machine.gpu_driver != first.gpu_driver:
            return f"its GPU driver is {machine.gpu_driver}, and that of the first node {first.gpu_driver}"
    elif machine.cpu != first.cpu:
        return f"its processor is {machine.cpu}, and that of the first node {first.cpu}"
    return None


def _device(gpu: Gpu) -> str:
    return f"{gpu.name} with {si_bytes(gpu.memory_bytes)}"
