"""Slots hold the experts that the cache says they hold, and its counters are the policy's own."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evalsuite.core.errors import StorageError, UsageError
from evalsuite.experts.cache import ExpertCache
from evalsuite.experts.policy import POLICIES, make_policy
from experts.stores import CPU, LAYOUT, MadeUp, disk, pinned


def cache_over(source, size, policy="lru", make=pinned, folder=None):
    cache = ExpertCache(make(source, folder), CPU, policy)
    cache.resize(size)
    return cache


def random_steps(experts, steps, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.choice(experts, rng.integers(1, experts + 1), replace=False).tolist() for _ in range(steps)]


def run(cache, source, layer, step):
    """Serve a step, and compare every slot with the expert that it is said to hold."""
    served = []
    views = LAYOUT.views(source.records[layer])
    for group in cache.layers[layer].serve(step):
        assert len(set(group.values())) == len(group), "two experts never share a slot"
        for expert, slot in group.items():
            for name, expected in views.items():
                found = cache.layers[layer].tensors[name][slot]
                assert torch.equal(found.view(torch.uint8), expected[expert].view(torch.uint8))
        served += group
    assert sorted(served) == sorted(step)


@pytest.mark.parametrize("make", [pinned, disk])
@pytest.mark.parametrize("size", [1, 2, 5, 7, 100, None])
def test_every_expert_of_every_step_is_in_its_slot(make, size, tmp_path):
    source = MadeUp()
    cache = cache_over(source, size, make=make, folder=tmp_path)
    for step in random_steps(7, 30):
        for layer in source.layers:
            run(cache, source, layer, step)
    cache.close()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("size", [1, 2, 4, 6, 7])
def test_counters_are_those_of_the_policy_over_the_same_steps(policy, size):
    source = MadeUp()
    cache = cache_over(source, size, policy)
    steps = {layer: random_steps(7, 40, seed=layer) for layer in source.layers}
    for layer, its_steps in steps.items():
        for step in its_steps:
            run(cache, source, layer, step)
    for counted in cache.counters().layers:
        alone = make_policy(policy, size, 7)
        placements = [p for step in steps[counted.layer] for p in alone.serve(step)]
        assert counted.steps == 40
        assert counted.hits == sum(p.hits for p in placements)
        assert counted.misses == sum(len(p.loads) for p in placements)
        assert counted.overflow_steps == sum(len(step) > size for step in steps[counted.layer])
        assert counted.bytes_moved == counted.misses * LAYOUT.record_bytes
        assert counted.hits + counted.misses == sum(map(len, steps[counted.layer]))
        assert counted.copy_s > 0
    cache.close()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 6), min_size=1).map(list), min_size=1, max_size=12),
    st.integers(1, 8),
    st.sampled_from(sorted(POLICIES)),
)
def test_any_steps(steps, size, policy):
    source = MadeUp()
    cache = cache_over(source, size, policy)
    for step in steps:
        run(cache, source, 3, step)
    cache.close()


def test_resizing_keeps_the_store_and_starts_anew(tmp_path):
    source = MadeUp()
    cache = cache_over(source, 2, make=disk, folder=tmp_path)
    for size in (2, 7, 4, None, 1, 3):
        cache.resize(size)
        assert cache.bytes == 3 * (size or 7) * LAYOUT.record_bytes
        for step in random_steps(7, 5):
            run(cache, source, 4, step)
        counters = cache.counters()
        if size is None:
            assert counters is None
        else:
            assert counters.size == size
            assert [layer.steps for layer in counters.layers] == [0, 0, 5]
    assert source.reads == 3
    cache.close()


def test_more_slots_than_experts_are_as_many_as_experts():
    cache = cache_over(MadeUp(), 1000)
    assert cache.size == 7
    assert (cache.counters().size, cache.counters().experts) == (7, 7)
    assert cache.counters().hit_rate is None
    cache.close()


def test_resetting_keeps_what_is_in_the_slots():
    source = MadeUp()
    cache = cache_over(source, 4)
    run(cache, source, 1, [0, 1, 2])
    cache.reset_counters()
    run(cache, source, 1, [1, 2, 5])
    first = cache.counters().layers[0]
    assert (first.steps, first.hits, first.misses, first.overflow_steps) == (1, 2, 1, 0)
    cache.close()


def test_the_aliasing_case():
    """Capacity 4, 20 steps of {0, 1, 2, 3}, then {4, 5}: a cache that does not pin puts both in one slot."""
    source = MadeUp()
    cache = cache_over(source, 4, "lfru")
    for _ in range(20):
        run(cache, source, 1, [0, 1, 2, 3])
    run(cache, source, 1, [4, 5])
    cache.close()


def test_after_a_failed_copy_nothing_counts_as_loaded(tmp_path, monkeypatch):
    source = MadeUp()
    cache = cache_over(source, 4, make=disk, folder=tmp_path)
    run(cache, source, 1, [0, 1, 2, 3])

    def fail(*args):
        raise StorageError("the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr("evalsuite.experts.store.read_records", fail)
        with pytest.raises(StorageError):
            list(cache.layers[1].serve([4, 5]))
    for step in ([4, 5], [0, 1]):
        run(cache, source, 1, step)
    cache.close()


@pytest.mark.parametrize(("size", "policy"), [(0, "lru"), (-3, "lru"), (4, "belady")])
def test_impossible_caches_are_refused(size, policy):
    with pytest.raises(UsageError):
        cache_over(MadeUp(), size, policy)


def test_a_refused_size_changes_nothing():
    source = MadeUp()
    cache = cache_over(source, 4)
    run(cache, source, 1, [0, 1])
    with pytest.raises(UsageError):
        cache.resize(0)
    run(cache, source, 1, [0, 1])
    assert cache.counters().hits == 2
    cache.close()
