"""The cache's kernels under Triton's interpreter against the policies' own rules; no pytest, no GPU.

    TRITON_INTERPRET=1 python interpreted.py

Hypothesis makes the traces: every policy, any size, steps of any number of tokens, padding, repeated experts.
"""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evalsuite.engines.vllm_plugin.device_cache import DeviceCache, relabel
from evalsuite.engines.vllm_plugin.host_store import HostExperts
from evalsuite.experts.policy import POLICIES, make_policy

EXPERTS = 12


def make(policy: str, size: int) -> DeviceCache:
    shapes = {"weight": ((3, 7), torch.float32), "scale": ((5,), torch.int32)}
    store = HostExperts(shapes, EXPERTS, pin=False)
    generator = torch.Generator().manual_seed(size)
    store.parts["weight"].copy_(torch.randn(EXPERTS, 3, 7, generator=generator))
    store.parts["scale"].copy_(torch.arange(5 * EXPERTS).view(EXPERTS, 5))
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
    cache, rule = make(policy, size), make_policy(policy, size, EXPERTS)
    hits = misses = overflows = 0
    for rows, padding in trace:
        real = rows[: len(rows) - padding]
        wanted = sorted({e for row in real for e in row})
        overflows += len(wanted) > size
        cache.token_limit.fill_(len(real))
        placements = iter(rule.serve(wanted))
        for group in cache.serve(torch.tensor(rows, dtype=torch.int32)):
            placement = next(placements, None)
            count = int(cache._load_count)
            loads = zip(cache._load_expert[:count].tolist(), cache._load_slot[:count].tolist(), strict=True)
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
                assert group.slot_of.tolist() == [placement.slots.get(e, -1) for e in range(EXPERTS)]
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
    assert cache._slot_of.tolist() == [-1] * EXPERTS


def check_relabelling():
    slot_of = torch.tensor([2, -1, 0, 1], dtype=torch.int32)
    blocks = torch.tensor([3, 0, 1, 2, -1, 4, 2**30, 3] * 50, dtype=torch.int32)
    relabel(blocks, slot_of)
    assert blocks.tolist() == [1, 2, 0, 0, 0, 0, 0, 1] * 50


if __name__ == "__main__":
    check()
    check_relabelling()
    print("the kernels follow the rules")
