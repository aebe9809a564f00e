"""The cache's kernels under Triton's interpreter against the policies' own rules; no GPU.

    TRITON_INTERPRET=1 python interpreted.py

Hypothesis makes the traces: every policy, any size, steps of any number of tokens, padding, repeated experts,
experts in memory and in a file that threads read while the kernels wait for them.
"""

import itertools
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evalsuite.core.errors import StorageError
from evalsuite.engines.vllm_plugin.copies import FileMailbox, Loads, as_words
from evalsuite.engines.vllm_plugin.device_cache import DeviceCache, relabel
from evalsuite.engines.vllm_plugin.disk_store import DiskExperts, ExpertFile
from evalsuite.engines.vllm_plugin.file_readers import PIECE_BYTES, ROOM, FileReaders
from evalsuite.engines.vllm_plugin.host_store import HostExperts
from evalsuite.experts.header import Header
from evalsuite.experts.layout import Field, RecordLayout
from evalsuite.experts.policy import POLICIES, make_policy

EXPERTS = 12
SHAPES = {"weight": ((3, 7), torch.float32), "scale": ((5,), torch.int32)}
LARGE = {"weight": ((PIECE_BYTES // 4 + 37,), torch.float32), "scale": ((5,), torch.int32)}
CPU = torch.device("cpu")


def make_file(folder: Path, parts: list[dict[str, torch.Tensor]]) -> ExpertFile:
    """An expert file of some layers; a part is [experts, …]."""
    fields = [
        Field(name, str(t.dtype).removeprefix("torch."), tuple(t.shape[1:])) for name, t in parts[0].items()
    ]
    layout = RecordLayout(tuple(fields))
    described = tuple((f.name, f.dtype, f.shape) for f in fields)
    header = Header(
        "0" * 64, "made up", "/nowhere", tuple(range(len(parts))), EXPERTS, layout.record_bytes, described
    )
    file = ExpertFile(header, layout, CPU, folder)
    for layer, its_parts in enumerate(parts):
        records = torch.zeros(EXPERTS, layout.record_bytes, dtype=torch.uint8)
        for view, part in zip(layout.views(records).values(), its_parts.values(), strict=True):
            view.copy_(part)
        file.offer(layer, lambda records=records: records)
    file.finish()
    return file


def make(policy: str, size: int, shapes=SHAPES, experts: int = EXPERTS) -> DeviceCache:
    store = HostExperts(shapes, experts, pin=False)
    generator = torch.Generator().manual_seed(size)
    store.parts["weight"].copy_(torch.randn(store.parts["weight"].shape, generator=generator))
    store.parts["scale"].copy_(torch.arange(5 * experts).view(experts, 5))
    slots = {name: torch.zeros(size, *t.shape[1:], dtype=t.dtype) for name, t in store.parts.items()}
    return DeviceCache(0, slots, store, policy)


@st.composite
def steps(draw):
    """Routed ids of a few tokens, and how many of the tokens only pad the step."""
    tokens = draw(st.integers(1, 5))
    top_k = draw(st.integers(1, 3))
    row = st.lists(st.integers(0, EXPERTS - 1), min_size=top_k, max_size=top_k)
    return draw(st.lists(row, min_size=tokens, max_size=tokens)), draw(st.integers(0, tokens - 1))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted(POLICIES)), st.integers(1, EXPERTS), st.lists(steps(), min_size=1, max_size=12))
def check(policy, size, trace):
    follow(policy, size, trace, EXPERTS)


def check_many(experts: int = 256, top_k: int = 8):
    """The shape of a large model: steps of one sequence, of eight, and a prefill."""
    generator = torch.Generator().manual_seed(0)
    for policy, size in itertools.product(sorted(POLICIES), (top_k, 64, 128, experts - 1)):
        trace = [
            (torch.rand(tokens, experts, generator=generator).topk(top_k).indices.tolist(), 0)
            for tokens in (1, 8, 1, 1, 8, 20)
        ]
        follow(policy, size, trace, experts)


def follow(policy, size, trace, experts):
    cache, rule = make(policy, size, experts=experts), make_policy(policy, size, experts)
    hits = misses = overflows = 0
    for rows, padding in trace:
        real = rows[: len(rows) - padding]
        wanted = sorted({e for row in real for e in row})
        overflows += len(wanted) > size
        cache.token_limit.fill_(len(real))
        placements = iter(rule.serve(wanted))
        for group in cache.serve(torch.tensor(rows, dtype=torch.int32)):
            placement = next(placements, None)
            wants = cache._loads
            count = int(wants.count)
            loads = zip(wants.expert[:count].tolist(), wants.slot[:count].tolist(), strict=True)
            if placement is None:  # a group that the step's shape allows and the step does not need
                assert count == 0
                assert (group.slot_of == -1).all()
                continue
            assert tuple(loads) == placement.loads
            hits, misses = hits + placement.hits, misses + count
            if group.slots is not None:
                assert group.slots[: len(real)].tolist() == [
                    [placement.slots[e] for e in row] for row in real
                ]
                assert group.slots.min() >= 0
                assert group.slots.max() < size
            else:
                assert group.slot_of.tolist() == [placement.slots.get(e, -1) for e in range(experts)]
            for expert, slot in placement.slots.items():
                for name, tensor in cache.slots.items():
                    assert torch.equal(tensor[slot], cache.store.parts[name][expert])
        assert next(placements, None) is None
        assert cache._slot_of.tolist() == rule.slot_of.tolist()
        assert cache._expert_in.tolist() == rule.expert_in.tolist()
        assert cache._last_used.tolist() == rule.last_used.tolist()
        if policy == "lfru":
            assert cache._frequency.numpy().tobytes() == rule.frequency.tobytes()
    counted = cache.counters()
    assert (counted.steps, counted.hits, counted.misses) == (len(trace), hits, misses)
    assert counted.overflow_steps == overflows
    cache.clear()
    assert cache.counters().steps == 0
    assert cache._slot_of.tolist() == [-1] * experts


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(1, EXPERTS), st.booleans(), st.lists(steps(), min_size=1, max_size=6))
def check_file(size, large, trace):
    """Two layers whose steps take turns at one file; a large expert comes in several pieces."""
    memory = [make("lru", size, LARGE if large else SHAPES) for _ in range(2)]
    memory[1].store.parts["weight"].neg_()
    with tempfile.TemporaryDirectory() as folder:
        file = make_file(Path(folder), [cache.store.parts for cache in memory])
        disk = [
            DeviceCache(i, {n: torch.zeros_like(t) for n, t in c.slots.items()},
                        DiskExperts(file, i, tuple(c.slots)), "lru")
            for i, c in enumerate(memory)
        ]  # fmt: skip
        for rows, _ in trace:
            ids = torch.tensor(rows, dtype=torch.int32)
            for one, other in zip(memory, disk, strict=True):
                for a, b in zip(one.serve(ids), other.serve(ids), strict=True):
                    assert torch.equal(a.slot_of, b.slot_of)
                    for name, tensor in one.slots.items():
                        assert torch.equal(tensor, other.slots[name])
        disk[0].check()
        file.mailbox.readers.stop()


def check_two_requests():
    """A group of more experts than one request has room for, read by several threads."""
    parts = make("lru", 4, LARGE).store.parts
    with tempfile.TemporaryDirectory() as folder:
        file = make_file(Path(folder), [parts])
        (path,) = Path(folder).iterdir()
        with path.open("rb") as opened:
            start, record_bytes = file.header.offset(0, 0), file.layout.record_bytes
            readers = FileReaders(opened.fileno(), path, start, record_bytes, CPU, readers=3)
            count = ROOM + 4
            order = torch.arange(count, dtype=torch.int32)
            loads = Loads(torch.tensor([count], dtype=torch.int32), order * 5 % EXPERTS, order.flip(0))
            slots = {name: part.new_zeros(count, *part.shape[1:]) for name, part in parts.items()}
            starts = tuple(start // 4 for start in file.layout.offsets[:-1])
            words = tuple(as_words(tensor) for tensor in slots.values())
            FileMailbox(readers, CPU).launch(0, starts, loads, words, count)
            readers.stop()
        for name, part in parts.items():
            assert torch.equal(slots[name][loads.slot], part[loads.expert])


def check_cut_file():
    """A file that becomes shorter under a running engine is told of, and nobody waits for ever."""
    parts = make("lru", 4).store.parts
    with tempfile.TemporaryDirectory() as folder:
        file = make_file(Path(folder), [parts])
        slots = {name: torch.zeros(4, *t.shape[1:], dtype=t.dtype) for name, t in parts.items()}
        cache = DeviceCache(0, slots, DiskExperts(file, 0, tuple(parts)), "lru")
        (path,) = Path(folder).iterdir()
        os.truncate(path, file.header.offset(0, 2))
        list(cache.serve(torch.tensor([[0, 1]], dtype=torch.int32)))
        cache.check()
        list(cache.serve(torch.tensor([[2, 3]], dtype=torch.int32)))
        with pytest.raises(StorageError, match="shorter"):
            cache.check()
        file.mailbox.readers.stop()


def check_relabelling():
    slot_of = torch.tensor([2, -1, 0, 1], dtype=torch.int32)
    blocks = torch.tensor([3, 0, 1, 2, -1, 4, 2**30, 3] * 50, dtype=torch.int32)
    relabel(blocks, slot_of)
    assert blocks.tolist() == [1, 2, 0, 0, 0, 0, 0, 1] * 50


if __name__ == "__main__":
    check()
    check_many()
    check_file()
    check_two_requests()
    check_cut_file()
    check_relabelling()
    print("the kernels follow the rules")
