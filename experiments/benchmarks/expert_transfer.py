"""How fast an expert cache fills its slots, next to how fast this machine can copy at all.

Quantity: bytes of experts that arrive in slots on the device per second (GB = 10⁹), through `LayerCache` as
an engine drives it: one step a layer, eight experts a step, none of which is there, so that every one is
copied. Experts have the real size of the 35B-A3B in INT4, 1.62 MB in one record, 256 a layer. Arms:

- pinned copy, large: one page-locked buffer to the device, the bound of any store on this machine;
- pinned copy, pieces: the same bytes in pieces of one expert, enqueued back to back;
- `pinned`: a `PinnedStore`;
- `disk, warm`: a `DiskStore` whose file is in the page cache;
- `disk, cold`: the same file after POSIX_FADV_DONTNEED, every expert once; bound by the disk, not by the bus;
- `kernels, pinned` and `kernels, disk, warm`, where vLLM is installed: the same steps through the kernels of
  the vLLM plugin, all layers in one CUDA graph.

Two times for each arm: by the host's clock, from the first step until the last copy is over, which counts
everything that a step costs beside its copies; and of the copies alone, by the events around them. The ratio
that counts is the host's over the large pinned copy. On a CPU the arms copy memory to memory, to be debugged
(with OMP_NUM_THREADS=1 on a busy machine).

    python experiments/benchmarks/expert_transfer.py --out transfer.json
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout that is not installed

from evalsuite.experts.cache import ExpertCache
from evalsuite.experts.header import Header
from evalsuite.experts.layout import Field, RecordLayout
from evalsuite.experts.store import DiskStore, ExpertStore, Identity, PinnedStore
from evalsuite.telemetry.machine import read_machine

HIDDEN, INTERMEDIATE, GROUP, TOP_K = 2048, 512, 128, 8
LAYOUT = RecordLayout(
    (
        Field("gate_up_packed", "int32", (2 * INTERMEDIATE, HIDDEN // 8)),
        Field("gate_up_scale", "bfloat16", (2 * INTERMEDIATE, HIDDEN // GROUP)),
        Field("down_packed", "int32", (HIDDEN, INTERMEDIATE // 8)),
        Field("down_scale", "bfloat16", (HIDDEN, INTERMEDIATE // GROUP)),
    )
)
IDENTITY = Identity("benchmark".ljust(64, "0"), "made-up experts", "/nowhere")


class MadeUpExperts:
    """Random records; a layer's are another layer's, rolled by a byte, since drawing 16 GB takes minutes."""

    layout = LAYOUT

    def __init__(self, layers: int, experts: int) -> None:
        self.layers, self.experts = tuple(range(layers)), experts
        numbers = np.random.default_rng(0).integers(0, 256, (experts, LAYOUT.record_bytes), np.uint8)
        self._records = torch.from_numpy(numbers)

    def read_layer(self, layer: int, out: Tensor) -> None:
        out.copy_(self._records)
        out[:, 0] = layer


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each repeat after one warm-up."""
    seconds: list[float] = []
    for i in range(repeats + 1):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        if i:
            seconds.append(time.perf_counter() - began)
    return seconds


def measure_copy(size: int, piece: int, device: torch.device, repeats: int) -> list[float]:
    """Seconds to copy `size` bytes from page-locked memory in pieces."""
    source = torch.ones(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(size, dtype=torch.uint8, device=device)
    pieces = list(zip(target.split(piece), source.split(piece), strict=True))

    def work() -> None:
        for to, part in pieces:
            to.copy_(part, non_blocking=True)

    return seconds_of(work, device, repeats)


def missing_steps(experts: int) -> Iterator[list[int]]:
    """Eight experts at a time, every expert once a round: with 8 slots and LRU, all of them misses."""
    order = np.random.default_rng(1).permutation(experts)
    while True:
        for start in range(0, experts - TOP_K + 1, TOP_K):
            yield order[start : start + TOP_K].tolist()


def fill(cache: ExpertCache, tokens: int, steps: dict[int, Iterator[list[int]]]) -> None:
    """What decoding does to a cache: a step in each layer, token after token."""
    for _ in range(tokens):
        for layer, slots in cache.layers.items():
            for _ in slots.serve(next(steps[layer])):
                pass


def measure_store(
    store: ExpertStore,
    device: torch.device,
    tokens: int,
    repeats: int,
    before: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Fill rates through a cache of eight slots; without a warm-up where `before` runs ahead of each."""
    cache = ExpertCache(store, device, "lru")
    cache.resize(TOP_K)
    steps = {layer: missing_steps(store.experts) for layer in cache.layers}
    seconds: list[float] = []
    copy_s: list[float] = []
    moved = 0
    for i in range(repeats + (before is None)):
        if before is not None:
            before()
        cache.reset_counters()
        synchronize(device)
        began = time.perf_counter()
        fill(cache, tokens, steps)
        synchronize(device)
        ended = time.perf_counter()
        counters = cache.counters()
        assert counters is not None
        assert counters.hits == 0, "every expert has to be copied"
        if i or before is not None:
            seconds.append(ended - began)
            copy_s.append(sum(layer.copy_s or 0 for layer in counters.layers))
            moved = counters.bytes_moved
    check_slots(cache, store)
    cache.close()
    return {"seconds": seconds, "copy_s": copy_s, "bytes": moved}


def check_slots(cache: ExpertCache, store: ExpertStore) -> None:
    """What was timed arrived: the slots hold the experts that the policy says."""
    layer, slots = next(iter(cache.layers.items()))
    assert slots.policy is not None
    expected = torch.zeros(
        TOP_K, LAYOUT.record_bytes, dtype=torch.uint8, device=slots.tensors["down_scale"].device
    )
    store.fill(layer, [(int(e), s) for s, e in enumerate(slots.policy.expert_in)], expected)
    synchronize(expected.device)
    views = LAYOUT.views(expected)
    for name, found in slots.tensors.items():
        if not torch.equal(found.view(torch.uint8), views[name].view(torch.uint8)):
            raise SystemExit(f"the slots do not hold their experts ({name}): the times mean nothing")


def evict(path: Path) -> None:
    """Drop a file from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def kernel_arms(
    source: MadeUpExperts, folder: Path, device: torch.device, tokens: int, repeats: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The plugin's caches of eight slots, filled from memory and from a file."""
    from evalsuite.engines.vllm_plugin.device_cache import DeviceCache
    from evalsuite.engines.vllm_plugin.disk_store import DiskExperts, ExpertFile
    from evalsuite.engines.vllm_plugin.host_store import HostExperts

    shapes = {f.name: (f.shape, getattr(torch, f.dtype)) for f in LAYOUT.fields}
    described = tuple((f.name, f.dtype, f.shape) for f in LAYOUT.fields)
    header = Header("1".ljust(64, "0"), IDENTITY.checkpoint, IDENTITY.source, source.layers, source.experts,
                    LAYOUT.record_bytes, described)  # fmt: skip
    file = ExpertFile(header, LAYOUT, device, folder)
    pinned: list[DeviceCache] = []
    disk: list[DeviceCache] = []

    def slots() -> dict[str, Tensor]:
        return {n: torch.zeros(TOP_K, *s, dtype=d, device=device) for n, (s, d) in shapes.items()}

    for layer in source.layers:
        records = torch.zeros(source.experts, LAYOUT.record_bytes, dtype=torch.uint8)
        source.read_layer(layer, records)
        store = HostExperts(shapes, source.experts, pin=True)
        for name, view in LAYOUT.views(records).items():
            store.parts[name].copy_(view)
        file.offer(layer, lambda records=records: records)
        pinned.append(DeviceCache(layer, slots(), store, "lru"))
        disk.append(DeviceCache(layer, slots(), DiskExperts(file, layer, tuple(shapes)), "lru"))
    file.finish()
    yield "kernels, pinned", measure_kernels(pinned, device, tokens, repeats)
    yield "kernels, disk, warm", measure_kernels(disk, device, tokens, repeats)
    for one, other in zip(pinned, disk, strict=True):
        if not all(
            torch.equal(t.view(torch.uint8), other.slots[n].view(torch.uint8)) for n, t in one.slots.items()
        ):
            raise SystemExit("the slots filled from the file differ from those filled from memory")
    disk[0].check()
    file.mailbox.readers.stop()


def measure_kernels(caches: list[Any], device: torch.device, tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds of each repeat, by the host's clock."""
    ids = torch.zeros(len(caches), 1, TOP_K, dtype=torch.int32, device=device)
    steps = [missing_steps(caches[0].experts) for _ in caches]
    routed = [
        torch.tensor([next(step) for step in steps], dtype=torch.int32).pin_memory() for _ in range(tokens)
    ]

    def decode() -> None:
        for cache, its_ids in zip(caches, ids, strict=True):
            list(cache.serve(its_ids))

    decode()
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode()
    seconds: list[float] = []
    for i in range(repeats + 1):
        for cache in caches:
            cache.clear()
        synchronize(device)
        began = time.perf_counter()
        for its_routed in routed:
            ids.copy_(its_routed.view(ids.shape), non_blocking=True)
            graph.replay()
        synchronize(device)
        if i:
            seconds.append(time.perf_counter() - began)
    counts = [cache.counters() for cache in caches]
    assert sum(c.hits for c in counts) == 0, "every expert has to be copied"
    return {"seconds": seconds, "bytes": len(caches) * tokens * TOP_K * LAYOUT.record_bytes}


def rates(name: str, measured: dict[str, Any], bound: float) -> dict[str, Any]:
    """Bytes per second by the host's clock and of the copies alone, medians, and the share of the bound."""
    by_host = measured["bytes"] / statistics.median(measured["seconds"])
    row: dict[str, Any] = {
        "arm": name,
        **measured,
        "gb_per_s": by_host / 1e9,
        "share_of_large_copy": by_host / bound,
    }
    if "copy_s" in measured:
        by_events = measured["bytes"] / statistics.median(measured["copy_s"])
        row |= {"copies_gb_per_s": by_events / 1e9, "copies_share": by_events / bound}
    return row


def policy_seconds(layers: int, experts: int, tokens: int) -> float:
    """What deciding alone costs a step, without a copy: it hides behind the copies of the step before."""
    from evalsuite.experts.policy import make_policy

    policies = [make_policy("lru", TOP_K, experts) for _ in range(layers)]
    steps = [missing_steps(experts) for _ in range(layers)]
    began = time.perf_counter()
    for _ in range(tokens):
        for policy, its_steps in zip(policies, steps, strict=True):
            list(policy.serve(next(its_steps)))
    return (time.perf_counter() - began) / (tokens * layers)


def main() -> None:
    parser = argparse.ArgumentParser(description="Rates at which an expert cache fills its slots.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, help="40 is the real model, 16.6 GB; 8 on a GPU, 2 on a CPU")
    parser.add_argument("--experts", type=int, help="a layer: 256 on a GPU, 32 on a CPU")
    parser.add_argument("--tokens", type=int, help="decoded tokens a repeat: 24 on a GPU, 4 on a CPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="for the expert file; a temporary one by default")
    args = parser.parse_args()

    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    layers = args.layers or (8 if on_gpu else 2)
    experts = args.experts or (256 if on_gpu else 32)
    tokens = args.tokens or (24 if on_gpu else 4)
    source = MadeUpExperts(layers, experts)
    size = layers * TOP_K * LAYOUT.record_bytes * max(1, 8 // layers)

    large = measure_copy(size, size, device, args.repeats)
    bound = size / statistics.median(large)
    pieces = measure_copy(size, LAYOUT.record_bytes, device, args.repeats)
    rows = [
        rates("pinned copy, large", {"seconds": large, "bytes": size}, bound),
        rates("pinned copy, pieces", {"seconds": pieces, "bytes": size}, bound),
    ]
    rows.append(
        rates("pinned", measure_store(PinnedStore(source, device), device, tokens, args.repeats), bound)
    )
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        warm = DiskStore(source, IDENTITY, device, folder)
        rows.append(rates("disk, warm", measure_store(warm, device, tokens, args.repeats), bound))
        cold = DiskStore(source, IDENTITY, device, folder)
        once = experts // TOP_K  # tokens after which every expert was read once
        measured = measure_store(
            cold, device, min(tokens, once), args.repeats, before=lambda: evict(cold.path)
        )
        rows.append(rates("disk, cold", measured, bound))
        if on_gpu and find_spec("vllm") is not None:
            arms = kernel_arms(source, folder, device, tokens, args.repeats)
            rows.extend(rates(name, measured, bound) for name, measured in arms)

    result = {
        "machine": read_machine().model_dump(mode="json"),
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "torch": torch.__version__, "layers": layers, "experts": experts, "tokens": tokens,
        "record_bytes": LAYOUT.record_bytes, "misses_a_step": TOP_K,
        "policy_s_a_step": policy_seconds(layers, experts, tokens), "rows": rows,
    }  # fmt: skip
    args.out.write_text(json.dumps(result, indent=1) + "\n")

    print(f"{result['device']}, {layers} layers of {experts} experts of {LAYOUT.record_bytes / 1e6:.3f} MB")
    print(f"{'arm':22}{'GB/s':>8}{'share':>8}{'copies alone':>14}{'share':>8}")
    for r in rows:
        alone = f"{r['copies_gb_per_s']:14.2f}{r['copies_share']:8.1%}" if "copies_gb_per_s" in r else ""
        print(f"{r['arm']:22}{r['gb_per_s']:8.2f}{r['share_of_large_copy']:8.1%}{alone}")
    step_s = TOP_K * LAYOUT.record_bytes / bound
    print(
        f"deciding takes {result['policy_s_a_step'] * 1e6:.0f} µs a step, "
        f"its copies at the bound {step_s * 1e6:.0f} µs"
    )


if __name__ == "__main__":
    main()
