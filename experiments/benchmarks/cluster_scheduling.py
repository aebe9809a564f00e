"""What a cluster run costs its driver: a simulation of up to 1,000 workers, and real workers on this machine.

    python experiments/benchmarks/cluster_scheduling.py --out results/benchmarks/cluster-scheduling-cpu.json

Three parts:

1. The queue of blocks and the loop around it, the ones that a run uses, in simulated time: workers of unlike
   speed, blocks that take 20 times as long, workers that die in the middle and come back later. Measured are
   the driver's processor time and memory for each window, and the simulated time against the least possible,
   which is all work over all workers.
2. The same with every line written to a run folder, as a run does.
3. Real workers on a Ray cluster of this machine, on loopback: windows a second against the number of workers,
   the time of an empty block there and back, and the driver's time for one of many that are under way. The
   built-in model, few windows.

Where it bends follows from these: a driver feeds no more workers than ``TARGET_S`` over Ray's time for a
block, and no more windows a second than it can write. Memory grows by the columns of the samples, 72 bytes a
window, and by what waits behind the slowest block.
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
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
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
WINDOW_S = 0.25  # of one window on a worker of average speed
STRAGGLERS, SLOWER = 0.001, 20.0  # the share of blocks that take so many times as long
DEATHS = 0.0005  # the share of blocks that end their worker half-way
RETURN_S = 60.0  # until another worker has loaded the model


class SimulatedPool:
    """Workers in simulated time; a window's score is its own number, so that a wrong order would show."""

    def __init__(self, workers: int, seed: int) -> None:
        self._random = random.Random(seed)
        self._clock_s = 0.0
        self._order = itertools.count()
        self._coming: list[tuple[float, int, Event]] = []
        self._speed: dict[str, float] = {}
        self.work_s, self.deaths, self.handed_out = 0.0, 0, 0
        for number in range(workers):
            self._come(f"worker {number}", self._random.uniform(0, RETURN_S / 10))

    def _come(self, name: str, after_s: float) -> None:
        self._speed[name] = self._random.lognormvariate(0, 0.2)
        self._later(after_s, Joined(name))

    def _later(self, after_s: float, event: Event) -> None:
        heapq.heappush(self._coming, (self._clock_s + after_s, next(self._order), event))

    def submit(self, worker: str, block: Block) -> None:
        self.handed_out += 1
        takes_s = block.windows * WINDOW_S * self._speed[worker]
        if self._random.random() < STRAGGLERS:
            takes_s *= SLOWER
        if self._random.random() < DEATHS:
            self.deaths += 1
            self._later(takes_s / 2, Left(worker, "by script"))
            self._come(f"worker {len(self._speed)}", takes_s / 2 + RETURN_S)
            return
        self.work_s += takes_s
        scores = BlockScores(tuple(float(i) for i in range(block.start, block.stop)))
        self._later(takes_s, Scored(worker, block, scores))

    def events(self) -> Sequence[Event]:
        if self._coming[0][0] > self._clock_s + 1.0:
            self._clock_s += 1.0
            return ()
        self._clock_s, _, event = heapq.heappop(self._coming)
        return (event,)

    def now_s(self) -> float:
        return self._clock_s


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
    spent_s = time.process_time() - began
    assert seen == windows
    assert sum(tally.windows.values()) == windows
    row: dict[str, Any] = {"workers": workers, "windows": windows}
    if memory:
        row["peak_bytes"] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return row
    return row | {
        "blocks": pool.handed_out, "deaths": pool.deaths, "repeats_dropped": queue.repeats,
        "driver_s_per_window": spent_s / windows, "driver_s_per_block": spent_s / pool.handed_out,
        "simulated_s": pool.now_s(), "least_s": windows * WINDOW_S / workers,
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

    def workers(self, count: int) -> None:
        pass

    def scored(self, done: int, total: int, perplexity: float) -> None:
        pass


def real(limit: int, counts: Sequence[int]) -> dict[str, Any]:
    """One machine without Ray, then workers that share its cores, one thread each."""
    from evalsuite.cluster.perplexity import run_perplexity_on
    from evalsuite.run.perplexity import run_perplexity

    os.environ.setdefault(LOOPBACK_VARIABLE, "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    spec = PerplexitySpec(model="demo", corpus="builtin", protocol=PROTOCOLS["card-1155"], limit=limit)
    rows: list[dict[str, Any]] = []
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": max(counts), "include_dashboard": False, "node_ip_address": "127.0.0.1"},
    )
    try:
        with tempfile.TemporaryDirectory() as scratch:
            store = RunStore(Path(scratch))
            alone = run_perplexity(spec, store, Quiet(), "fresh")
            rows.append(speed_of(alone, 0, alone, limit))
            for count in counts:
                choice = ClusterChoice(cluster.address, workers=count)
                found = run_perplexity_on(choice, spec, store, Quiet(), "fresh")
                rows.append(speed_of(found, count, alone, limit))
        return {"rows": rows, "round_trip_s": round_trip(cluster.address)}
    finally:
        cluster.shutdown()


def speed_of(found: Any, count: int, alone: Any, limit: int) -> dict[str, Any]:
    same = load_windows(found.path).equals(load_windows(alone.path))
    return {
        "workers": count, "windows": limit, "windows_per_s": limit / found.record.results.scoring_s,
        "identical_windows": same,
    }  # fmt: skip


class Echo:
    """A worker that scores nothing."""

    def score(self, block: Block) -> BlockScores:
        return BlockScores((0.0,) * block.windows)


def round_trip(address: str) -> dict[str, float]:
    """An empty block to an actor and back, one at a time, by the callbacks that a run uses."""
    import queue as queues

    from evalsuite.cluster.connect import connected

    with connected(address) as ray:
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--limit", type=int, default=60, help="windows that real workers score")
    parser.add_argument("--windows", type=int, default=1_000_000, help="windows of the largest simulation")
    args = parser.parse_args()
    document: dict[str, Any] = {"benchmark": "cluster-scheduling", "machine": read_machine().model_dump()}
    document["settings"] = {
        "target_s": TARGET_S, "batch": BATCH, "window_s": WINDOW_S, "straggler_share": STRAGGLERS,
        "straggler_factor": SLOWER, "death_share": DEATHS, "return_s": RETURN_S,
    }  # fmt: skip
    sizes = [(10, 10_000), (100, 100_000), (1000, 100_000), (1000, args.windows)]
    document["load_average_1min"] = os.getloadavg()[0]  # of whoever else is on this machine
    for name, work in {
        "real": lambda: real(args.limit, (1, 2)),
        "simulated": lambda: [simulate(*size, memory=False) | simulate(*size, memory=True) for size in sizes],
        "written": lambda: [alone(written, *size) for size in sizes],
        "bends": lambda: {
            "workers_at_target": TARGET_S / document["real"]["round_trip_s"]["of_many_s"],
            "windows_per_s": 1 / document["written"][-1]["wall_s_per_window"],
        },
    }.items():
        document[name] = work()
        print(json.dumps({name: document[name]}, indent=1), flush=True)
        if args.out is not None:
            args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
