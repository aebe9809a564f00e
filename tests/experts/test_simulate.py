"""The compiled simulator against the policies themselves, event for event."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evalsuite.core.errors import UsageError
from evalsuite.experts.belady import Belady
from evalsuite.experts.policy import EMPTY, POLICIES, make_policy
from evalsuite.experts.simulate import CODES, count, layer_steps, simulate, steps_of
from experts.traces import trace

EXPERTS = 12


def build(name, slots, sets, experts=EXPERTS):
    return Belady(slots, experts, sets) if name == "belady" else make_policy(name, slots, experts)


def played(policy, sets):
    """Misses of each step and every load, as the policy itself makes them."""
    misses, loads = [], []
    for wanted in sets:
        groups = list(policy.serve(wanted))
        misses.append(sum(len(group.loads) for group in groups))
        loads += [
            (expert, slot, old)
            for group in groups
            for (expert, slot), old in zip(group.loads, group.evicted, strict=True)
        ]
    return misses, loads


def test_the_simulator_knows_every_policy():
    assert set(CODES) == {*POLICIES, "belady"}


@pytest.mark.parametrize("name", CODES)
@settings(deadline=None, max_examples=200)
@given(
    slots=st.integers(1, EXPERTS + 2),
    sets=st.lists(st.lists(st.integers(0, EXPERTS - 1), min_size=1, unique=True), min_size=1, max_size=60),
)
def test_event_for_event_as_the_policy(name, slots, sets):
    sets = [sorted(wanted) for wanted in sets]
    counts = count(steps_of(sets, EXPERTS), name, slots, record_loads=True)
    misses, loads = played(build(name, slots, sets), sets)
    assert counts.misses.tolist() == misses
    assert [tuple(row) for row in counts.loads.tolist()] == loads


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("slots", [8, 24, 64])
def test_event_for_event_at_the_size_of_a_real_layer(name, slots):
    """Long enough for frequencies to reach their cap and ages to grow."""
    rng = np.random.default_rng(1)
    weights = rng.dirichlet(np.full(64, 0.2))
    sets = [sorted(rng.choice(64, 8, replace=False, p=weights * 0.9 + 0.1 / 64).tolist()) for _ in range(700)]
    counts = count(steps_of(sets, 64), name, slots, record_loads=True)
    misses, loads = played(build(name, slots, sets, 64), sets)
    assert counts.misses.tolist() == misses
    assert [tuple(row) for row in counts.loads.tolist()] == loads
    assert counts.loads[0, 2] == EMPTY


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("size", [1, 4, 7, 16])
def test_counters_by_layer_and_phase_are_those_of_a_hand_count(name, size):
    source = trace()
    found = simulate(source, name, size, layer_steps(source))
    prefill = source.step_is_prefill()
    for index, sets in enumerate(source.sets()):
        misses, _ = played(build(name, size, sets, 16), sets)
        for phase, steps in (("prefill", prefill), ("decode", ~prefill), ("all", prefill | ~prefill)):
            layer = found[phase].layers[index]
            missed = sum(m for m, take in zip(misses, steps, strict=True) if take)
            distinct = [len(s) for s, take in zip(sets, steps, strict=True) if take]
            assert (layer.steps, layer.misses) == (len(distinct), missed)
            assert layer.hits == sum(distinct) - missed
            assert layer.overflow_steps == sum(d > size for d in distinct)
            assert layer.bytes_moved == 1000 * missed


def test_steps_of_a_trace_are_its_sets():
    source = trace(seed=3)
    for layer, sets in zip(layer_steps(source), source.sets(), strict=True):
        found = [layer.wanted[a:b].tolist() for a, b in zip(layer.starts[:-1], layer.starts[1:], strict=True)]
        assert found == sets


def test_all_resident_misses_each_expert_once():
    source = trace(requests=6)
    found = simulate(source, "lru", 16, layer_steps(source))["all"]
    used = [len(set(source.chosen[:, layer].ravel().tolist())) for layer in range(2)]
    assert [layer.misses for layer in found.layers] == used
    assert found.overflow_steps == 0


@pytest.mark.parametrize(("policy", "size"), [("random", 8), ("lru", 0), ("lru", -4)])
def test_impossible_requests_are_refused(policy, size):
    source = trace()
    with pytest.raises(UsageError):
        simulate(source, policy, size, layer_steps(source))
