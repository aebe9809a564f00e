"""Every policy against its rules written down a second time, against cachetools, and against the optimum."""

import pytest
from cachetools import LRUCache
from hypothesis import given, settings
from hypothesis import strategies as st

from evalsuite.core.errors import UsageError
from evalsuite.experts.belady import Belady
from evalsuite.experts.policy import EMPTY, POLICIES, make_policy
from experts.brute_force import fewest_misses, replay

EXPERTS = 9
ALL = [*POLICIES, "belady"]


def runs(most=EXPERTS, longest=40):
    """Slots, and the experts of each step."""
    step = st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=most, unique=True)
    return st.tuples(st.integers(1, EXPERTS + 1), st.lists(step, max_size=longest))


@st.composite
def fitting_runs(draw, longest=30, most_slots=6, experts=EXPERTS):
    """Runs in which no step needs more experts than there are slots."""
    size = draw(st.integers(1, most_slots))
    step = st.lists(st.integers(0, experts - 1), min_size=1, max_size=min(size, experts), unique=True)
    return size, draw(st.lists(step, max_size=longest))


def build(name, slots, steps, experts=EXPERTS):
    return Belady(slots, experts, steps) if name == "belady" else make_policy(name, slots, experts)


def events(policy, steps):
    """The same record of a run as `replay` gives."""
    found = []
    for now, wanted in enumerate(steps, 1):
        for group in policy.serve(wanted):
            loaded = dict(group.loads)
            found += [("hit", now, e, s, None) for e, s in sorted(group.slots.items()) if e not in loaded]
            found += [
                ("load", now, e, s, None if old == EMPTY else old)
                for (e, s), old in zip(group.loads, group.evicted, strict=True)
            ]
    return found


def misses(name, slots, steps):
    return sum(event[0] == "load" for event in events(build(name, slots, steps), steps))


@pytest.mark.parametrize("name", ALL)
@given(run=runs())
def test_event_for_event_as_the_rules_say(name, run):
    slots, steps = run
    assert events(build(name, slots, steps), steps) == replay(name, slots, steps)


@pytest.mark.parametrize("name", ALL)
@given(run=runs())
def test_a_group_is_wholly_resident_and_no_two_experts_share_a_slot(name, run):
    slots, steps = run
    policy = build(name, slots, steps)
    for wanted in steps:
        served = []
        for group in policy.serve(wanted):
            assert 1 <= len(group.slots) <= slots
            assert len(set(group.slots.values())) == len(group.slots)
            for expert, slot in group.slots.items():
                assert policy.expert_in[slot] == expert
                assert policy.slot_of[expert] == slot
            assert not set(group.evicted) & set(group.slots)
            resident = policy.expert_in[policy.expert_in != EMPTY].tolist()
            assert len(set(resident)) == len(resident)
            assert sorted(resident) == [e for e in range(EXPERTS) if policy.slot_of[e] != EMPTY]
            served += group.slots
        assert sorted(served) == sorted(wanted)


@pytest.mark.parametrize("name", ALL)
@given(run=fitting_runs())
def test_an_expert_of_a_step_that_fits_is_never_evicted_within_it(name, run):
    slots, steps = run
    policy = build(name, slots, steps)
    for wanted in steps:
        (group,) = policy.serve(wanted)
        assert not set(group.evicted) & set(wanted)
        assert {int(e) for e in policy.expert_in} >= set(wanted)


@pytest.mark.parametrize("name", ALL)
def test_aliasing_after_twenty_steps_of_four_experts_in_four_slots(name):
    """A cache that forgets to pin puts 4 and 5 into one slot: whichever it loads second evicts the first."""
    steps = [[0, 1, 2, 3]] * 20 + [[4, 5]]
    policy = build(name, 4, steps)
    for wanted in steps:
        (group,) = policy.serve(wanted)
    assert sorted(group.slots) == [4, 5]
    assert group.slots[4] != group.slots[5]
    assert policy.expert_in[group.slots[4]] == 4
    assert policy.expert_in[group.slots[5]] == 5
    assert set(group.evicted) == {0, 1}


@pytest.mark.parametrize("name", ALL)
def test_overflow_is_served_in_groups_residents_first(name):
    steps = [[5], [0, 1, 2, 5, 6]]
    policy = build(name, 2, steps)
    list(policy.serve([5]))
    groups = [list(group.slots) for group in policy.serve([6, 2, 1, 0, 5])]
    assert groups == [[5, 0], [1, 2], [6]]


@given(
    slots=st.integers(1, 6),
    wanted=st.lists(st.integers(0, EXPERTS - 1), max_size=80),
)
def test_lru_of_single_experts_is_that_of_cachetools(slots, wanted):
    theirs = LRUCache(slots)
    ours = make_policy("lru", slots, EXPERTS)
    for expert in wanted:
        known, before = expert in theirs, set(theirs)
        if known:
            theirs[expert]
        else:
            theirs[expert] = True
        (group,) = ours.serve([expert])
        assert group.hits == known
        assert {e for e in group.evicted if e != EMPTY} == before - set(theirs)


@settings(deadline=None)
@given(run=fitting_runs(longest=7, most_slots=3, experts=5))
def test_belady_is_the_optimum_of_trying_everything(run):
    slots, steps = run
    assert misses("belady", slots, steps) == fewest_misses(slots, steps)


@pytest.mark.parametrize("name", POLICIES)
@given(run=fitting_runs(longest=60))
def test_no_policy_beats_belady_where_every_step_fits(name, run):
    slots, steps = run
    assert misses("belady", slots, steps) <= misses(name, slots, steps)


@pytest.mark.parametrize("name", ALL)
@given(run=runs())
def test_every_expert_that_was_wanted_counts_once(name, run):
    slots, steps = run
    assert len(events(build(name, slots, steps), steps)) == sum(map(len, steps))


@pytest.mark.parametrize("name", ALL)
def test_with_a_slot_for_each_expert_only_first_uses_miss(name):
    steps = [[0, 3], [3, 5], [0, 5, 8], [8]]
    assert misses(name, EXPERTS, steps) == 4


def test_lfu_forgets_what_was_popular_long_ago():
    """Without ageing, 0 and 1 would keep their slots forever, having been used ten times each."""
    steps = [[0, 1]] * 10 + [[2], [3]] * 12
    policy = make_policy("lfu", 2, EXPERTS)
    events(policy, steps)
    assert set(policy.expert_in.tolist()) == {2, 3}


def test_segmented_lru_keeps_what_was_hit_through_a_scan():
    steps = [[0], [0], [1], [2], [3], [4], [5]]
    policy = make_policy("slru", 2, EXPERTS)
    events(policy, steps)
    assert 0 in policy.expert_in
    assert misses("slru", 2, [*steps, [0]]) < misses("lru", 2, [*steps, [0]])


def test_segmented_lru_puts_who_leaves_protection_behind_the_newcomers():
    """Two of four slots are protected: the hit of 3 pushes 0 out after 2 has come, so 5 takes the slot of 2."""
    policy = make_policy("slru", 4, EXPERTS)
    events(policy, [[0], [1], [0], [1], [2], [3], [3], [5]])
    assert set(policy.expert_in.tolist()) == {0, 1, 3, 5}


def test_lfru_scores_are_the_published_formula():
    policy = make_policy("lfru", 3, EXPERTS)
    events(policy, [[0], [0], [0], [1]])
    assert policy.frequency[:2].tolist() == pytest.approx([0.95 * 1.95 + 1, 1.0])
    assert policy._scores()[:2].tolist() == pytest.approx([(0.95 * 1.95 + 1) / 2, 1.0])


def test_lfru_frequency_is_capped():
    policy = make_policy("lfru", 1, EXPERTS)
    events(policy, [[0]] * 400)
    assert policy.frequency[0] == pytest.approx(1 / (1 - 0.95), rel=1e-4)
    assert policy.frequency[0] <= 20


@pytest.mark.parametrize(("name", "slots"), [("mru", 4), ("lru", 0), ("lru", -1)])
def test_impossible_policies_are_refused(name, slots):
    with pytest.raises(UsageError):
        make_policy(name, slots, EXPERTS)


def test_belady_refuses_another_future_than_the_one_it_was_told():
    policy = Belady(2, EXPERTS, [[0, 1]])
    with pytest.raises(ValueError, match="step 1 needs other experts"):
        list(policy.serve([0, 2]))
