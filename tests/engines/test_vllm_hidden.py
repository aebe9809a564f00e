"""The watch over vLLM's model runner, against the head applied to each prompt as a whole."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evalsuite.engines.head import Head, nats_of
from evalsuite.engines.vllm_hidden import REQUEST, _Watch

WIDTH, VOCABULARY = 8, 50
HEAD = Head(torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0)))


def states_of(number, length):
    """What the model makes of a prompt."""
    return torch.randn(length, WIDTH, generator=torch.Generator().manual_seed(number))


class Runner:
    """A model runner that computes whatever the scheduler says, and keeps the order where vLLM's two do."""

    def __init__(self, newer, lengths):
        self.newer, self.lengths = newer, lengths
        self.execute_model_state = None

    def execute_model(self, scheduled):
        begins = dict(
            zip(
                scheduled.scheduled_cached_reqs.req_ids,
                scheduled.scheduled_cached_reqs.num_computed_tokens,
                strict=True,
            )
        )
        begins |= {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        counts = scheduled.num_scheduled_tokens
        order = sorted(counts, key=lambda name: (counts[name], name))  # not the scheduler's
        rows = []
        for name in order:
            number = int(name[1:])
            states = torch.cat([states_of(number, self.lengths[number]), torch.zeros(4, WIDTH)])
            rows.append(states[begins[name] : begins[name] + counts[name]])
        padding = torch.full((3, WIDTH), torch.nan)
        batch = SimpleNamespace(req_ids=order)
        self.execute_model_state = SimpleNamespace(hidden_states=torch.cat([*rows, padding]))
        if self.newer:
            self.execute_model_state.input_batch = batch
        else:
            self.input_batch = batch


def new_request(number, first, targets, asked=True):
    extra = {REQUEST: {"number": number, "first": first, "targets": targets}} if asked else None
    return SimpleNamespace(
        req_id=f"r{number}", num_computed_tokens=0, sampling_params=SimpleNamespace(extra_args=extra)
    )


def step(new, cached, counts):
    return SimpleNamespace(
        scheduled_new_reqs=new,
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(cached), num_computed_tokens=list(cached.values())
        ),
        num_scheduled_tokens=counts,
    )


@st.composite
def schedules(draw):
    """Prompts as (length, first scored position, whether it is scored at all), and the steps that compute
    them: of any size, several requests a step, some preempted and computed anew, one token generated."""
    prompts = draw(
        st.lists(
            st.integers(1, 12).flatmap(
                lambda n: st.tuples(st.just(n), st.integers(0, n - 1), st.booleans())
            ),
            min_size=1, max_size=5,
        )
    )  # fmt: skip
    computed = dict.fromkeys(range(len(prompts)), 0)
    entered: set[int] = set()
    preemptions = draw(st.integers(0, 2))
    steps = []
    while waiting := [n for n, done in computed.items() if done < prompts[n][0] + 1]:
        chosen = [n for n in waiting if not draw(st.booleans())] or waiting[:1]
        requests = []
        for number in chosen:
            if computed[number] and preemptions and draw(st.booleans()):
                computed[number], preemptions = 0, preemptions - 1
            left = prompts[number][0] + 1 - computed[number]
            count = left - draw(st.integers(0, left - 1))
            requests.append((number, number not in entered, computed[number], count))
            computed[number] += count
        entered |= set(chosen)
        steps.append(requests)
    return prompts, steps


@pytest.mark.parametrize("newer", [False, True], ids=["older runner", "newer runner"])
@settings(max_examples=60, deadline=None)
@given(schedules())
def test_every_schedule_gives_the_same_scores(newer, case):
    prompts, steps = case
    runner = Runner(newer, [length for length, _, _ in prompts])
    watch = _Watch(runner, HEAD, 0, True, runner.execute_model)
    targets = [
        np.random.default_rng(number).integers(0, VOCABULARY, length - first).tolist()
        for number, (length, first, _) in enumerate(prompts)
    ]
    for requests in steps:
        new = [
            new_request(n, prompts[n][1], targets[n], prompts[n][2]) for n, is_new, _, _ in requests if is_new
        ]
        cached = {f"r{n}": begin for n, is_new, begin, _ in requests if not is_new}
        watch.step(step(new, cached, {f"r{n}": count for n, _, _, count in requests}))
    found = watch.take(first_rank=True)
    assert set(found) == {number for number, (_, _, asked) in enumerate(prompts) if asked}
    for number, score in found.items():
        length, first, _ = prompts[number]
        hidden = states_of(number, length)[first:]
        expected = nats_of(hidden, torch.tensor(targets[number]), HEAD).numpy()
        np.testing.assert_allclose(score.log_sum - score.logit, expected, rtol=1e-5, atol=1e-5)
        kept = torch.from_numpy(score.hidden).view(torch.bfloat16)
        assert torch.equal(kept, hidden.to(torch.bfloat16))
        assert score.seen.all()
    assert watch.take(first_rank=True) == {}


def test_positions_that_no_pass_reached_are_told():
    runner = Runner(newer=True, lengths=[6])
    watch = _Watch(runner, HEAD, 0, False, runner.execute_model)
    watch.step(step([new_request(0, 2, [1, 2, 3, 4])], {}, {"r0": 4}))
    (score,) = watch.take(first_rank=True).values()
    assert score.seen.tolist() == [True, True, False, False]
    assert score.hidden is None


def test_other_ranks_send_no_hidden_states():
    runner = Runner(newer=True, lengths=[3])
    watch = _Watch(runner, HEAD, 0, True, runner.execute_model)
    watch.step(step([new_request(0, 1, [1, 2])], {}, {"r0": 3}))
    (score,) = watch.take(first_rank=False).values()
    assert score.hidden is None
