"""Workers on a Ray cluster: Ray places them, starts them and says when they are gone.

A node that may take part gets as many of them as it has room for. Workers that die are replaced, and so are
those that the driver takes to be stuck.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from evalsuite.cluster.admission import Admission
from evalsuite.cluster.blocks import Block
from evalsuite.cluster.dispatch import Event, Failed, Joined, Left, Scored
from evalsuite.cluster.inbox import Inbox, reason_of
from evalsuite.cluster.member import Member, names, start_member
from evalsuite.cluster.nodes import Node
from evalsuite.cluster.order import Order, Watcher
from evalsuite.cluster.scorer import Closing, Opened
from evalsuite.core.errors import EngineDied, EvalError, TimedOut, UsageError
from evalsuite.core.units import duration

LOOK_S = 2.0  # how often new nodes are looked for
CLOSE_S = 30.0
HEAD_S = 300.0  # an output head has gigabytes; a worker that stopped answering never sends it
WAIT_S = 10.0  # a worker that has not started for so long is said to wait
LOAD_S, SLOW_LOAD = 900.0, 10.0  # one that loads for so long, and so many times longer than others, is named
AWAY_S = 10.0  # no turn counts as more: whoever does not listen has not waited
EMPTY_S = 120.0  # how long a cluster may be without a worker that is loading or loaded

LEAVE = "Ctrl-C ends the run, and the same command goes on from what is written."


class RayPool:
    """The workers of one run.

    Args:
        ray: the module, connected.
        look_s, empty_s, wait_s: as the constants above.
        clock: seconds.

    Attributes:
        admission: which nodes may have workers.
        opened: of every worker that ever was ready, by its name, with its node.
    """

    def __init__(
        self,
        ray: Any,
        order: Order,
        watcher: Watcher,
        *,
        look_s: float = LOOK_S,
        empty_s: float = EMPTY_S,
        wait_s: float = WAIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ray, self._order, self._watcher = ray, order, watcher
        self._look_s, self._empty_s, self._wait_s = look_s, empty_s, wait_s
        self._ids: Any = ray.put(order.ids)
        self._inbox = Inbox()
        self.admission = Admission(ray, order, watcher, self._inbox, lambda node: self._fill([node]))
        self._loading: set[str] = set()  # nodes on which a worker has started
        self._late = 0  # workers that were said to wait
        self._error: EvalError | None = None
        self._members: dict[str, Member] = {}
        self._named = 0
        self._looked_s = -1e9
        self._clock, self._asked_s, self._now_s = clock, clock(), 0.0
        self._alive_s = 0.0
        self.opened: dict[str, tuple[Node, Opened]] = {}

    def now_s(self) -> float:
        """Seconds in which this process listened: one that was stopped for an hour has not waited an hour."""
        at_s = self._clock()
        self._now_s += min(at_s - self._asked_s, AWAY_S)
        self._asked_s = at_s
        return self._now_s

    def first(self) -> tuple[list[str], Opened]:
        """Wait for a worker; returns all that came at once, and what the first of them loaded.

        Raises:
            EvalError: what it failed with, or what keeps every node out.
        """
        self.admission.require_fitting()
        while True:
            joined = [event.worker for event in self.events() if isinstance(event, Joined)]
            if joined:
                return joined, self.opened[joined[0]][1]

    def _say_who_waits(self) -> None:
        """Ray starts a worker as soon as its node has room, and says nothing until then."""
        end_s = self.now_s() - self._wait_s
        late = sum(m.started_s is None and m.asked_s <= end_s for m in self._members.values())
        if late > self._late:
            free: dict[str, float] = self._ray.available_resources()
            demand = self._order.demand
            wanted = f"{demand.cpus:g} CPUs" + f" and {demand.gpus} GPUs" * bool(demand.gpus)
            left = f"{free.get('CPU', 0.0):g} CPUs" + f" and {free.get('GPU', 0.0):g} GPUs" * bool(
                demand.gpus
            )
            who = "worker has" if late == 1 else "workers have"
            self._watcher.phase(
                f"{late} {who} not started: each needs {wanted} on its node, and the whole cluster has "
                f"{left} free; what others hold is waited for"
            )
        self._late = late

    def _say_who_loads_for_long(self) -> None:
        """Such a worker may be stuck, or its disk slow; nobody can tell from here."""
        slowest_s = max((opened.load_s for _, opened in self.opened.values()), default=0.0)
        after_s = max(LOAD_S, SLOW_LOAD * slowest_s)
        now_s = self.now_s()
        late = [m for m in self._members.values() if m.loads_s(now_s) >= after_s and not m.said]
        for member in late:
            member.said = True
        if late:
            self._watcher.warn(f"Still loading the model after {duration(after_s)}: {names(late)}. {LEAVE}")

    def events(self) -> Sequence[Event]:
        """See `evalsuite.cluster.dispatch.Pool`."""
        if self.now_s() - self._looked_s >= self._look_s:
            self._looked_s = self.now_s()
            self.admission.look()
            self._say_who_waits()
            self._say_who_loads_for_long()
        found = self._inbox.read(min(self._look_s, 1.0))
        self._require_somebody()
        return found

    def _require_somebody(self) -> None:
        if self._members or self.admission.undecided:
            self._alive_s = self.now_s()
        elif not self.opened and self._error is not None:
            raise self._error
        elif not self.opened and self.admission.refused:
            raise UsageError(
                "No node of the cluster may take part.",
                cause="; ".join(self.admission.refused) + ".",
                todo="install the driver's versions there, or run the command without --cluster.",
            )
        elif self.now_s() - self._alive_s > self._empty_s:
            raise EngineDied(
                f"No worker is left, and for {self._empty_s:.0f} s none has come.",
                cause="; ".join(self.admission.refused),
                todo="start nodes and run the same command again; what is scored is kept.",
            )

    def _fill(self, nodes: Iterable[Node]) -> None:
        """Start workers on these nodes where there is room, as many as the run may have."""
        order, most = self._order, self._order.workers
        on_node = Counter(member.node.id for member in self._members.values())
        for node in nodes:
            for _ in range(order.demand.places(node) - on_node[node.id]):
                if most is not None and len(self._members) >= most:
                    return
                self._start(node)

    def _start(self, node: Node) -> None:
        self._named += 1
        name = f"worker {self._named} on node {node.number}"
        member = start_member(self._ray, self._order, name, node, self.now_s())
        self._members[name] = member
        self._inbox.expect(member.actor.__ray_ready__.remote(), self._started, name)
        opening = member.actor.open.remote(self._ids, self._order.window_bos, self._order.fingerprint)
        self._inbox.expect(opening, self._opened, name)

    def _started(self, name: str, future: Future[Any]) -> Iterable[Event]:
        """Ray has given a worker its place; where it never does, `open` says why."""
        member = self._members.get(name)
        if member is None or future.exception() is not None:
            return ()
        member.started_s = self.now_s()
        node = member.node
        if node.id not in self._loading:
            self._loading.add(node.id)
            machine = self.admission.machines[node.number]
            gpus = f", {machine.gpus[0].name}" if machine.gpus else ""
            self._watcher.phase(f"{node.name}: {machine.cpu}{gpus}: loading")
        return ()

    def _opened(self, name: str, future: Future[Any]) -> Iterable[Event]:
        member = self._members.get(name)
        if member is None:
            return ()
        try:
            opened: Opened | EvalError = future.result()
        except self._ray.exceptions.RayError as error:
            return self._lost(member, reason_of(error))
        if isinstance(opened, EvalError):
            self._error = opened
            return self._unfit(member, opened.what)
        if (reason := self._unlike(opened)) is not None:
            return self._unfit(member, reason)
        member.opened = opened
        self.opened[name] = member.node, opened
        self._count()
        return (Joined(name),)

    def _unfit(self, member: Member, reason: str) -> Iterable[Event]:
        self._drop(member)
        self.admission.refuse_worker(member.name, member.node, reason)
        self._fill(self.admission.nodes())  # others may take its place
        return ()

    def _unlike(self, opened: Opened) -> str | None:
        """How a worker computes otherwise than the first one."""
        if not self.opened:
            return None
        _, first = next(iter(self.opened.values()))
        mine, theirs = opened.facts, first.facts
        if mine.device_name != theirs.device_name:
            return f"it has {mine.device_name}, and the run is on {theirs.device_name}"
        here, there = opened.choice.identity, first.choice.identity
        if here != there or mine.computed != theirs.computed:
            keys = [key for key, value in there.items() if here.get(key) != value]
            return f"it would compute otherwise: {', '.join(keys) or mine.computed}"
        return None

    def submit(self, worker: str, block: Block) -> None:
        """See `evalsuite.cluster.dispatch.Pool`."""
        member = self._members[worker]
        self._inbox.expect(member.actor.score.remote(block), self._scored, worker, block)

    def _scored(self, name: str, block: Block, future: Future[Any]) -> Iterable[Event]:
        member = self._members.get(name)
        if member is None:  # it was replaced, and its block is another's
            return ()
        try:
            found = future.result()
        except self._ray.exceptions.RayError as error:
            return self._lost(member, reason_of(error))
        if isinstance(found, EngineDied | TimedOut):
            return self._lost(member, found.what)
        if isinstance(found, EvalError):
            return (Failed(name, block, found),)
        self.admission.worked(member.node)
        return (Scored(name, block, found),)

    def silent(self, workers: Sequence[str], silent_s: float, stuck_after_s: float | None) -> None:
        """See `evalsuite.cluster.dispatch.Pool`."""
        then = (
            "No block has come back yet, so slow cannot be told from stuck, and they are left to work."
            if stuck_after_s is None
            else f"A worker that has one for {duration(stuck_after_s)} is ended, and another takes its place."
        )
        self._watcher.warn(
            f"No worker has answered for {duration(silent_s)}. Blocks are with "
            f"{names([self._members[name] for name in workers])}. {then} {LEAVE}"
        )

    def replace(self, worker: str, reason: str) -> None:
        """See `evalsuite.cluster.dispatch.Pool`."""
        self._lost(self._members[worker], reason)

    def _lost(self, member: Member, reason: str) -> Iterable[Event]:
        """A worker is gone; another takes its place while its node can be trusted."""
        self._drop(member)
        self._count()
        self._watcher.phase(f"{member.name} is gone: {reason}")
        self.admission.died(member.node, reason)
        self._fill(self.admission.nodes())
        return (Left(member.name, reason),) if member.opened else ()

    def _drop(self, member: Member) -> None:
        self._members.pop(member.name, None)
        member.end(self._ray)

    def _count(self) -> None:
        self._watcher.workers(sum(member.opened is not None for member in self._members.values()))

    def head(self) -> bytes:
        """The output head of a living worker.

        Raises:
            EngineDied: none could give it.
        """
        for member in self._loaded():
            with suppress(self._ray.exceptions.RayError):
                found = self._ray.get(member.actor.head.remote(), timeout=HEAD_S)
                if isinstance(found, EvalError):
                    raise found
                return found
        raise EngineDied(
            "No worker is left to write the output head.", todo="run the same command again to resume."
        )

    def finish(self) -> list[Closing]:
        """Close every engine; of those that do not answer in time there is nothing."""
        refs = [member.actor.close.remote() for member in self._loaded()]
        ready, _ = self._ray.wait(refs, num_returns=len(refs), timeout=CLOSE_S) if refs else ([], [])
        closings: list[Closing] = []
        for ref in ready:
            with suppress(self._ray.exceptions.RayError):
                found = self._ray.get(ref)
                if not isinstance(found, EvalError):
                    closings.append(found)
        return closings

    def _loaded(self) -> list[Member]:
        return [member for member in self._members.values() if member.opened is not None]

    def close(self) -> None:
        """End every worker at once."""
        for member in list(self._members.values()):
            self._drop(member)
