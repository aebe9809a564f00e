"""What a cluster run costs its driver: a simulation of up to 1,000 workers, and real workers on this machine.

    python experiments/benchmarks/cluster_scheduling.py --out results/benchmarks/cluster-scheduling-cpu.json

Parts, of which ``--parts`` chooses:

1. The queue of blocks and the loop around it, the ones that a run uses, in simulated time: workers of unlike
   speed, blocks that take 20 times as long, workers that die in the middle and come back later. Measured are
   the driver's processor time without the simulation's own, its memory, and the simulated time against the
   least possible: all windows over Σ 1/pace of the workers that were drawn, each while it was there.
2. The same with every line written to a run folder, as a run does.
3. On a Ray cluster of this machine, on loopback: the time of an empty block there and back, and the driver's
   time for one of many that are under way.
4. Windows a second against the number of real workers there: the built-in model, few windows, a thread each.
   It says something only on a machine that has nothing else to do.

Where it bends follows from these: a driver feeds no more workers than ``TARGET_S`` over Ray's time for a
block, and no more windows a second than it can write. Memory grows by the columns of the samples and the
lists that they come from, and by what waits behind the slowest block; the file has both, measured.
"""

import argparse
import heapq
import itertools
import json
import os
import random
import resource
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from evalsuite.cluster.blocks import TARGET_S, Block, BlockQueue
from evalsuite.cluster.connect import LOOPBACK_VARIABLE, ClusterChoice
from evalsuite.cluster.dispatch import BlockScores, Event, Finished, Joined, Left, Scored, Tally, dispatch
from evalsuite.core.protocol import PROTOCOLS
from evalsuite.core.spec import PerplexitySpec
from evalsuite.data.tokens import TokenStream
from evalsuite.data.windows import window
from evalsuite.measure.perplexity import window_row
from evalsuite.store.runs import RunStore, load_windows
from evalsuite.telemetry.machine import read_machine

BATCH = 8
WINDOW_S = 0.05  # of one window on a worker of average speed: a block of TARGET_S is five batches
STRAGGLERS, SLOWER = 0.001, 20.0  # the share of blocks that take so many times as long
DEATHS = 0.0005  # the share of blocks that end their worker half-way
RETURN_S = 60.0  # until another worker has loaded the model
THREADS = 1  # of every process
PARTS = ("simulated", "written", "round_trip", "throughput")
os.environ["OMP_NUM_THREADS"] = str(THREADS)  # before torch or Ray is imported


class SimulatedPool:
    """Workers in simulated time; a window's score is its own number, so that a wrong order would show."""

    def __init__(self, workers: int, seed: int) -> None:
        self._random = random.Random(seed)
        self._clock_s = 0.0
        self._order = itertools.count()
        self._coming: list[tuple[float, int, Joined | Left | tuple[str, Block]]] = []
        self._pace_s: dict[str, float] = {}  # of one window
        self._there_s: dict[str, list[float]] = {}  # when each worker came and, if it died, went
        self.deaths, self.handed_out = 0, 0
        self.own_s = 0.0  # that the simulation takes of the driver's time
        for number in range(workers):
            self._come(f"worker {number}", self._random.uniform(0, RETURN_S / 10))

    def _come(self, name: str, after_s: float) -> None:
        self._pace_s[name] = WINDOW_S * self._random.lognormvariate(0, 0.2)
        self._there_s[name] = [self._clock_s + after_s]
        self._later(after_s, Joined(name))

    def _later(self, after_s: float, event: Joined | Left | tuple[str, Block]) -> None:
        heapq.heappush(self._coming, (self._clock_s + after_s, next(self._order), event))

    def submit(self, worker: str, block: Block) -> None:
        began = time.process_time()
        self._hand_out(worker, block)
        self.own_s += time.process_time() - began

    def _hand_out(self, worker: str, block: Block) -> None:
        self.handed_out += 1
        takes_s = block.windows * self._pace_s[worker]
        if self._random.random() < STRAGGLERS:
            takes_s *= SLOWER
        if self._random.random() < DEATHS:
            self.deaths += 1
            self._later(takes_s / 2, Left(worker, "by script"))
            self._there_s[worker].append(self._clock_s + takes_s / 2)
            self._come(f"worker {len(self._pace_s)}", takes_s / 2 + RETURN_S)
            return
        self._later(takes_s, (worker, block))

    def events(self) -> Sequence[Event]:
        began = time.process_time()
        found = self._next()
        self.own_s += time.process_time() - began
        return found

    def _next(self) -> Sequence[Event]:
        if self._coming[0][0] > self._clock_s + 1.0:
            self._clock_s += 1.0
            return ()
        self._clock_s, _, event = heapq.heappop(self._coming)
        if not isinstance(event, tuple):
            return (event,)
        worker, block = event
        return (Scored(worker, block, BlockScores(tuple(map(float, range(block.start, block.stop))))),)

    def silent(self, workers: Sequence[str], silent_s: float, stuck_after_s: float | None) -> None:
        raise AssertionError(f"nobody answered for {silent_s} s")

    def replace(self, worker: str, reason: str) -> None:
        raise AssertionError(f"{worker}: {reason}")

    def now_s(self) -> float:
        return self._clock_s

    def least_s(self, windows: int) -> float:
        """When as many windows could have been scored by workers that never wait, while each was there."""
        changes = sorted(
            (at_s, sign / self._pace_s[worker])
            for worker, there in self._there_s.items()
            for at_s, sign in zip(there, (1, -1), strict=False)
        )
        rate, now_s, left = 0.0, 0.0, float(windows)
        for at_s, change in [*changes, (float("inf"), 0.0)]:
            if rate * (at_s - now_s) >= left > 0 and rate > 0:
                break
            left -= rate * (at_s - now_s) if rate > 0 else 0.0
            now_s, rate = at_s, rate + change
        return now_s + left / rate


def simulate(workers: int, windows: int, memory: bool) -> dict[str, Any]:
    """The queue and the loop alone. Tracing memory slows the clock: each is measured in a run of its own."""
    queue: BlockQueue[tuple[str, BlockScores]] = BlockQueue(windows, 0, BATCH)
    pool, tally = SimulatedPool(workers, seed=workers), Tally()
    seen = 0

    def write(blocks: Sequence[Finished]) -> None:
        nonlocal seen
        for block, scores in blocks:
            assert block.start == seen
            assert scores.nats == tuple(map(float, range(block.start, block.stop)))
            seen = block.stop

    if memory:
        tracemalloc.start()
    began = time.process_time()
    dispatch(queue, pool, write, tally)
    spent_s = time.process_time() - began - pool.own_s
    assert seen == windows
    assert sum(tally.windows.values()) == windows
    row: dict[str, Any] = {"workers": workers, "windows": windows}
    if memory:
        row["peak_bytes"] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return row
    least_s = pool.least_s(windows)
    assert pool.now_s() >= least_s
    return row | {
        "workers_that_scored": len(tally.windows), "blocks": pool.handed_out,
        "windows_per_block": windows / pool.handed_out, "deaths": pool.deaths,
        "repeats_dropped": queue.repeats, "simulation_s_per_block": pool.own_s / pool.handed_out,
        "driver_s_per_window": spent_s / windows, "driver_s_per_block": spent_s / pool.handed_out,
        "simulated_s": pool.now_s(), "least_s": least_s,
    }  # fmt: skip


def written(workers: int, windows: int) -> dict[str, Any]:
    """The same, with every line in a run folder; the text is one byte a token, all alike."""
    protocol = PROTOCOLS["card-1155"]
    tokens = protocol.context + protocol.stride * (windows - 1)
    ones = np.broadcast_to(np.int64(1), tokens)
    stream = TokenStream(ones, ones, ones)
    queue: BlockQueue[tuple[str, BlockScores]] = BlockQueue(windows, 0, BATCH)
    pool, tally = SimulatedPool(workers, seed=workers), Tally()
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        folder = RunStore(Path(scratch)).begin("ppl", "simulated", "0" * 12, {"spec": {}}, "fresh")
        appends = 0

        def write(blocks: Sequence[Finished]) -> None:
            nonlocal appends
            appends += 1
            folder.append(
                [
                    window_row(stream, window(block.start + i, tokens, protocol), nats, block.batch)
                    for block, scores in blocks
                    for i, nats in enumerate(scores.nats)
                ]
            )

        before = resident_bytes()
        began, processor = time.monotonic(), time.process_time()
        dispatch(queue, pool, write, tally)
        seconds, processor_s = time.monotonic() - began, time.process_time() - processor
        grown = resident_bytes() - before
        folder.close()
    return {
        "workers": workers, "windows": windows, "appends": appends,
        "wall_s_per_window": seconds / windows, "driver_s_per_window": processor_s / windows,
        "wall_s_per_append": seconds / appends, "resident_growth_bytes": grown,
        "resident_growth_bytes_per_window": grown / windows,
    }  # fmt: skip


def alone(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """In a process of its own, whose memory nothing has used before."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def resident_bytes() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize()


class Quiet:
    """A watcher that looks away."""

    def phase(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass

    def workers(self, count: int) -> None:
        pass

    def scored(self, done: int, total: int, perplexity: float) -> None:
        pass


@contextmanager
def ray_here(cpus: int) -> Iterator[Any]:
    """The address of a cluster of this machine alone, on loopback, that ends with the block."""
    os.environ.setdefault(LOOPBACK_VARIABLE, "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    head = {"num_cpus": cpus, "include_dashboard": False, "node_ip_address": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield cluster.address
    finally:
        cluster.shutdown()


def throughput(limit: int, counts: Sequence[int]) -> list[dict[str, Any]]:
    """One machine without Ray, then workers that share its cores, one thread each."""
    from evalsuite.cluster.perplexity import run_perplexity_on
    from evalsuite.run.perplexity import run_perplexity

    spec = PerplexitySpec(model="demo", corpus="builtin", protocol=PROTOCOLS["card-1155"], limit=limit)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch, ray_here(max(counts)) as address:
        store = RunStore(Path(scratch))
        alone = run_perplexity(spec, store, Quiet(), "fresh")
        rows.append(speed_of(alone, 0, alone, limit))
        for count in counts:
            choice = ClusterChoice(address, workers=count)
            found = run_perplexity_on(choice, spec, store, Quiet(), "fresh")
            rows.append(speed_of(found, count, alone, limit))
    return rows


def speed_of(found: Any, count: int, alone: Any, limit: int) -> dict[str, Any]:
    same = load_windows(found.path).equals(load_windows(alone.path))
    return {
        "workers": count, "workers_that_scored": sum(worker.windows > 0 for worker in found.record.workers),
        "threads_each": THREADS, "windows": limit, "windows_per_s": limit / found.record.results.scoring_s,
        "identical_windows": same,
    }  # fmt: skip


class Echo:
    """A worker that scores nothing."""

    def score(self, block: Block) -> BlockScores:
        return BlockScores((0.0,) * block.windows)


def round_trip() -> dict[str, float]:
    """An empty block to an actor and back, one at a time, by the callbacks that a run uses."""
    import queue as queues

    from evalsuite.cluster.connect import connected

    with ray_here(1) as address, connected(address) as ray:
        actor = ray.remote(Echo).options(num_cpus=1).remote()
        inbox: queues.SimpleQueue[Any] = queues.SimpleQueue()
        times: list[float] = []
        for number in range(1100):
            began = time.monotonic()
            actor.score.remote(Block(number, number + BATCH, BATCH)).future().add_done_callback(inbox.put)
            inbox.get().result()
            times.append(time.monotonic() - began)
        count = 2000
        began = time.monotonic()
        for number in range(count):
            actor.score.remote(Block(number, number + BATCH, BATCH)).future().add_done_callback(inbox.put)
        for _ in range(count):
            inbox.get().result()
        many_s = (time.monotonic() - began) / count
    kept = np.array(times[100:])
    return {
        "median_s": float(np.median(kept)), "p99_s": float(np.quantile(kept, 0.99)), "n": len(kept),
        "of_many_s": many_s,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", default=",".join(PARTS), help="which to measure; the file has no others")
    parser.add_argument("--limit", type=int, default=60, help="windows that real workers score")
    parser.add_argument("--windows", type=int, default=1_000_000, help="windows of the largest simulation")
    args = parser.parse_args()
    chosen = args.parts.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"there is no part {', '.join(unknown)}: choose among {', '.join(PARTS)}")
    document: dict[str, Any] = {"benchmark": "cluster-scheduling", "machine": read_machine().model_dump()}
    document["settings"] = {
        "target_s": TARGET_S, "batch": BATCH, "window_s": WINDOW_S, "straggler_share": STRAGGLERS,
        "straggler_factor": SLOWER, "death_share": DEATHS, "return_s": RETURN_S, "threads": THREADS,
    }  # fmt: skip
    sizes = [(10, 10_000), (100, 100_000), (1000, 100_000), (1000, args.windows)]
    works: dict[str, Callable[[], Any]] = {
        "simulated": lambda: [simulate(*size, memory=False) | simulate(*size, memory=True) for size in sizes],
        "written": lambda: [alone(written, *size) for size in sizes],
        "round_trip": round_trip,
        "throughput": lambda: throughput(args.limit, (1, 2)),
    }
    document["load_average_1min"] = {}  # before each part, of whoever else is on this machine
    for name in (name for name in PARTS if name in chosen):
        document["load_average_1min"][name] = os.getloadavg()[0]
        document[name] = works[name]()
        print(json.dumps({name: document[name]}, indent=1), flush=True)
    document["bends"] = {}
    if "round_trip" in document:
        document["bends"]["workers_at_target"] = TARGET_S / document["round_trip"]["of_many_s"]
    if "written" in document:
        document["bends"]["windows_per_s"] = 1 / document["written"][-1]["wall_s_per_window"]
    if args.out is not None:
        args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
