"""The loop with workers by script: what it writes, what it refuses, and whom it names."""

import math

import numpy as np
import pytest

from evalsuite.cluster.blocks import BlockQueue
from evalsuite.cluster.dispatch import BlockScores, Failed, Joined, Left, Scored, Tally, dispatch
from evalsuite.core.errors import EngineDied, MeasurementError, NonFiniteScore, OutOfMemory


class ScriptedPool:
    """Answers at once, by a function of worker and block that gives events."""

    def __init__(self, answer, joining=("one", "two")):
        self._coming = [Joined(name) for name in joining]
        self._answer, self._clock_s, self.submitted = answer, 0.0, []

    def submit(self, worker, block):
        self.submitted.append((worker, block))
        self._coming += self._answer(worker, block)

    def events(self):
        assert self._coming, "the loop waits for nothing"
        self._clock_s += 1.0
        return [self._coming.pop(0)]

    def now_s(self):
        return self._clock_s


def right(worker, block):
    return [Scored(worker, block, BlockScores(tuple(map(float, range(block.start, block.stop)))))]


def run(answer, total=12, joining=("one", "two")):
    written, tally = [], Tally()
    pool = ScriptedPool(answer, joining)
    dispatch(BlockQueue(total, 0, 2), pool, writer(written), tally)
    return written, tally, pool


def writer(written):
    def write(blocks):
        for block, scores in blocks:
            assert len(written) == block.start
            written.extend(scores.nats)

    return write


def test_windows_come_in_order_and_are_credited_to_who_scored_them():
    written, tally, _ = run(right)
    assert written == list(map(float, range(12)))
    assert set(tally.windows) == {"one", "two"}
    assert sum(tally.windows.values()) == 12


def test_a_block_that_comes_twice_is_written_once():
    written, tally, _ = run(lambda worker, block: right(worker, block) * 2)
    assert written == list(map(float, range(12)))
    assert sum(tally.windows.values()) == 12


def test_a_worker_that_leaves_loses_nothing():
    left = []

    def answer(worker, block):
        if worker == "one" and not left:
            left.append(block)
            return [Left("one", "by script"), Joined("three")]
        return right(worker, block)

    written, tally, pool = run(answer)
    assert written == list(map(float, range(12)))
    assert "one" not in tally.windows
    assert [block for _, block in pool.submitted].count(left[0]) == 2, "scored again exactly once"


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_no_number_is_a_failure_with_the_name_of_its_worker(poison):
    def answer(worker, block):
        if worker == "two":
            return [Scored(worker, block, BlockScores((poison,) * block.windows))]
        return right(worker, block)

    with pytest.raises(NonFiniteScore, match=rf"two returned {poison} for window 2"):
        run(answer)


@pytest.mark.parametrize(
    ("end", "error"),
    [
        (
            lambda worker, block: Scored(worker, block, BlockScores((math.nan,) * block.windows)),
            NonFiniteScore,
        ),
        (lambda worker, block: Failed(worker, block, MeasurementError("It fails.")), MeasurementError),
    ],
)
def test_what_came_in_the_same_turn_as_an_end_is_written_before_it(end, error):
    class OneTurn(ScriptedPool):
        """Every event that is there comes at once."""

        def events(self):
            found, self._coming = self._coming, []
            return found

    written, tally = [], Tally()
    pool = OneTurn(lambda worker, block: right(worker, block) if worker == "one" else [end(worker, block)])
    with pytest.raises(error, match="two"):
        dispatch(BlockQueue(12, 0, 2), pool, writer(written), tally)
    assert written == [0.0, 1.0]
    assert tally.windows == {"one": 2}


def test_too_few_windows_are_a_failure():
    with pytest.raises(EngineDied, match="one returned 1 windows of 2"):
        run(lambda worker, block: [Scored(worker, block, BlockScores((1.0,)))])


def test_what_a_worker_raises_carries_its_name():
    error = MeasurementError("It fails.", cause="by script", todo="change it")
    with pytest.raises(MeasurementError) as found:
        run(lambda worker, block: [Failed(worker, block, error)])
    assert (found.value.what, found.value.cause, found.value.todo) == (
        "one: It fails.",
        "by script",
        "change it",
    )


def test_a_batch_that_does_not_fit_is_halved_and_said_so():
    def answer(worker, block):
        if block.batch > 1:
            return [Failed(worker, block, OutOfMemory("too large"))]
        return right(worker, block)

    written, tally, _ = run(answer)
    assert written == list(map(float, range(12)))
    assert tally.warnings[0] == "a batch of 2 windows did not fit; went on with 1"


def test_hidden_states_stay_with_their_windows():
    def answer(worker, block):
        states = tuple(np.full((1, 1), i, np.uint16) for i in range(block.start, block.stop))
        return [Scored(worker, block, BlockScores((0.0,) * block.windows, states))]

    kept = []
    dispatch(
        BlockQueue(8, 0, 2), ScriptedPool(answer),
        lambda blocks: kept.extend(int(h[0, 0]) for _, scores in blocks for h in scores.hidden), Tally(),
    )  # fmt: skip
    assert kept == list(range(8))
