"""A perplexity run on a cluster: the windows, the lines and the record of one machine, scored by many.

The driver plans and writes; workers only score. Blocks are whole batches of the one machine's run, so every
window has the nats that it has there, bit for bit, as long as no batch has to be made smaller. Expert-cache
counters and times are the cluster's own: each worker has a cache of its own.

Lines are written in text order, so a driver that dies loses what waited for an earlier block. A late block
goes to another worker before any new one is begun, so that is what the workers do in about ten seconds, or in
four times what a block takes where that is longer.
"""

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from evalsuite.cluster.blocks import BlockQueue
from evalsuite.cluster.connect import ClusterChoice, connected, open_to_others, resolve
from evalsuite.cluster.dispatch import BlockScores, Tally, dispatch
from evalsuite.cluster.dispatch import Finished as FinishedBlock
from evalsuite.cluster.nodes import Demand, read_node
from evalsuite.cluster.order import Order
from evalsuite.cluster.pool import RayPool
from evalsuite.cluster.scorer import Closing, Opened
from evalsuite.core.cache import CacheCounters, LayerCounters
from evalsuite.core.errors import UsageError
from evalsuite.core.record import ModelFacts, Record, Status, Worker, status_of
from evalsuite.core.spans import mean_exp
from evalsuite.core.spec import PerplexitySpec, spec_hash
from evalsuite.core.telemetry import Telemetry
from evalsuite.data.models import local_name
from evalsuite.engines.scorers import ScorerChoice
from evalsuite.engines.vllm_arguments import built_for_cpu
from evalsuite.measure.perplexity import Progress, ScoringRun, summarise, window_row
from evalsuite.run.perplexity import (
    Finished,
    Request,
    Text,
    perplexity_record,
    prepare_request,
    with_expert_cache,
)
from evalsuite.store.folder import RunFolder, storage_errors
from evalsuite.store.runs import ResumeMode, RunStore
from evalsuite.telemetry.machine import read_machine

HELD_HIDDEN_BATCHES = 16  # hidden states are large: fewer wait in the driver's memory


class ClusterProgress(Progress, Protocol):
    """Whoever watches a run on a cluster."""

    def workers(self, count: int) -> None:
        """So many workers are ready."""
        ...

    def warn(self, text: str) -> None:
        """Somebody should look at this."""
        ...


def run_perplexity_on(
    choice: ClusterChoice,
    spec: PerplexitySpec,
    store: RunStore,
    progress: ClusterProgress,
    mode: ResumeMode = "auto",
) -> Finished:
    """As `evalsuite.run.perplexity.run_perplexity`, scored by the workers of a Ray cluster.

    Raises:
        EvalError: as there; and UsageError where no cluster answers, or none of its nodes may take part.
    """
    address = resolve(choice.address)
    if spec.device != "auto":
        raise UsageError(
            "--gpus names GPUs of this machine, and with --cluster Ray chooses.",
            todo="leave --gpus out; --gpu-kind chooses among kinds.",
        )
    if len(choice.gpu_kinds) > 1:
        raise UsageError(
            "A perplexity run takes one kind of GPU.",
            cause="rounding differs between them, so one number cannot come from several.",
            todo="run the command once for each.",
        )
    request = prepare_request(spec, store.root, progress)
    if note := open_to_others(address):
        progress.phase(note)
    progress.phase(f"connecting to the cluster at {address}")
    with connected(address) as ray:
        pool = RayPool(ray, _order(ray, choice, spec, request), progress)
        try:
            return _carry_out(pool, spec, request, store, progress, mode)
        finally:
            pool.close()


def _order(ray: Any, choice: ClusterChoice, spec: PerplexitySpec, request: Request) -> Order:
    """What each worker gets: as many threads as the engine would have here, or GPUs where there are any."""
    from evalsuite.engines.torch import torch_threads  # torch takes seconds to import

    threads = torch_threads()
    cpu_only = spec.engine == "vllm" and built_for_cpu()
    kind = next(iter(choice.gpu_kinds), None)
    nodes = [read_node(number, found) for number, found in enumerate(ray.nodes()) if found["Alive"]]
    if not cpu_only and any(node.gpus and node.is_of(kind) for node in nodes):
        demand = Demand(1.0, spec.tensor_parallel_size)
    else:
        demand = Demand(float(spec.tensor_parallel_size * threads), 0)
    stream = request.text.stream
    return Order(
        spec=spec.model_copy(update={"model": local_name(spec.model)}),
        ids=stream.ids, window_bos=stream.window_bos,
        fingerprint=request.checkpoint.fingerprint(), threads=threads, driver=read_machine(),
        demand=demand, gpu_kind=kind, workers=choice.workers,
    )  # fmt: skip


def _carry_out(
    pool: RayPool,
    spec: PerplexitySpec,
    request: Request,
    store: RunStore,
    progress: ClusterProgress,
    mode: ResumeMode,
) -> Finished:
    joined, opened = pool.first()
    facts, scorer, text = opened.facts, opened.choice, request.text
    request.check_loaded(facts, spec)
    identity = request.identity(spec) | scorer.identity
    folder = store.begin(spec.kind, request.checkpoint.slug, spec_hash(spec), identity, mode)
    tally = Tally()
    try:
        scoring = _score(pool, joined, opened, spec, text, folder, progress, tally)
        if spec.keep_hidden:
            with storage_errors(folder.path):
                (folder.path / "head.safetensors").write_bytes(pool.head())
        closings = pool.finish()
        results = summarise(
            folder.rows.frame(), available=text.available,
            load_s=max(opened.load_s for _, opened in pool.opened.values()), scoring=scoring,
        )  # fmt: skip
        record = _record(pool, folder, spec, "ok", scorer, facts, text, tally)
        memory = _memory(closings)
        warnings = (*record.warnings, *memory.warnings())
        record = record.model_copy(update={"results": results, "telemetry": memory, "warnings": warnings})
        if spec.moe_expert_cache_size is not None and scoring.forward_tokens:
            record = with_expert_cache(record, _added([c.expert_cache for c in closings if c.expert_cache]))
        return Finished(folder.finish(record), record)
    except BaseException as error:
        record = _record(pool, folder, spec, status_of(error), scorer, facts, text, tally)
        folder.leave_unfinished(record, error)
        raise


def _score(
    pool: RayPool,
    joined: Sequence[str],
    opened: Opened,
    spec: PerplexitySpec,
    text: Text,
    folder: RunFolder,
    progress: ClusterProgress,
    tally: Tally,
) -> ScoringRun:
    """Score what `folder` does not have yet."""
    done, total = len(folder.rows), len(text.windows)
    if folder.rows:
        batch = int(folder.rows[-1]["batch"])
    else:
        batch = opened.largest_batch if spec.batch_size == "auto" else spec.batch_size
    assert batch is not None, "a worker measures where the spec leaves it open"
    nats = math.fsum(folder.rows.column("nats"))
    scored = int(sum(folder.rows.column("scored")))
    before, forward = scored, 0

    def write(blocks: Sequence[FinishedBlock]) -> None:
        nonlocal nats, scored, forward
        rows = [
            window_row(text.stream, text.windows[block.start + place], found, block.batch)
            for block, scores in blocks
            for place, found in enumerate(scores.nats)
        ]
        folder.append(rows, [hidden for _, scores in blocks for hidden in scores.hidden])
        nats += math.fsum(row["nats"] for row in rows)
        scored += sum(row["scored"] for row in rows)
        forward += sum(row["stop"] - row["start"] for row in rows)
        progress.scored(len(folder.rows), total, mean_exp(nats, scored))

    queue: BlockQueue[tuple[str, BlockScores]] = (
        BlockQueue(total, done, batch, held=HELD_HIDDEN_BATCHES * batch, most_batches=1)
        if spec.keep_hidden
        else BlockQueue(total, done, batch)
    )
    progress.phase("scoring")
    progress.scored(done, total, mean_exp(nats, scored))
    began = time.monotonic()
    dispatch(queue, pool, write, tally, joined)
    seconds = time.monotonic() - began
    return ScoringRun(seconds, scored - before, forward, queue.batch, done)


def _record(
    pool: RayPool,
    folder: RunFolder,
    spec: PerplexitySpec,
    status: Status,
    scorer: ScorerChoice,
    facts: ModelFacts,
    text: Text,
    tally: Tally,
) -> Record:
    workers = tuple(
        Worker(
            name=name, machine=pool.admission.machines[node.number], device_name=opened.facts.device_name,
            windows=tally.windows.get(name, 0), load_s=opened.load_s,
        )
        for name, (node, opened) in pool.opened.items()
    )  # fmt: skip
    machine = workers[0].machine
    record = perplexity_record(folder, spec, status, scorer, facts, text, machine)
    return record.model_copy(
        update={
            "workers": workers,
            "engaged": record.engaged | {"workers": sum(worker.windows > 0 for worker in workers)},
            "warnings": (*record.warnings, *tally.warnings, *pool.admission.refused),
        }
    )


def _memory(closings: Sequence[Closing]) -> Telemetry:
    """The highest peaks of any worker that lived to the end."""
    if not closings:
        return Telemetry(rss_peak_bytes=None, absent={"memory": "no worker answered at the end"})
    found = [closing.memory for closing in closings]
    return Telemetry(
        rss_peak_bytes=_highest(one.rss_peak_bytes for one in found),
        gpu_allocated_peak_bytes=_highest(one.gpu_allocated_peak_bytes for one in found),
        gpu_reserved_peak_bytes=_highest(one.gpu_reserved_peak_bytes for one in found),
        gpu_device_used_bytes=_highest(one.gpu_device_used_bytes for one in found),
        neighbours=tuple(dict.fromkeys(who for one in found for who in one.neighbours)),
        absent=found[0].absent,
    )


def _highest(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _added(counters: Sequence[CacheCounters]) -> CacheCounters | None:
    """Sums over the workers, layer by layer."""
    if not counters:
        return None
    layers: dict[int, LayerCounters] = {}
    for layer in (layer for counter in counters for layer in counter.layers):
        before = layers.get(layer.layer)
        layers[layer.layer] = layer if before is None else _sum(before, layer)
    return counters[0].model_copy(update={"layers": tuple(layers.values())})


def _sum(a: LayerCounters, b: LayerCounters) -> LayerCounters:
    copy_s = None if a.copy_s is None or b.copy_s is None else a.copy_s + b.copy_s
    return LayerCounters(
        layer=a.layer, steps=a.steps + b.steps, hits=a.hits + b.hits, misses=a.misses + b.misses,
        overflow_steps=a.overflow_steps + b.overflow_steps, bytes_moved=a.bytes_moved + b.bytes_moved,
        copy_s=copy_s,
    )  # fmt: skip
