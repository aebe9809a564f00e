"""The loop with workers by script: what it writes, what it refuses, and whom it names."""

import math

import numpy as np
import pytest

from evalsuite.cluster.blocks import MOST_LOSSES, STUCK_S, BlockQueue
from evalsuite.cluster.dispatch import SILENT_S, BlockScores, Failed, Joined, Left, Scored, Tally, dispatch
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


class HangingPool:
    """Workers of which some never answer, with a clock that goes ten seconds a turn.

    Args:
        hangs: whether a worker hangs on a block; another takes its place when it is replaced.
        until_s: when those that hang answer after all.
    """

    def __init__(self, hangs, workers=("one", "two"), until_s=math.inf):
        self._coming = [Joined(name) for name in workers]
        self._hangs, self._until_s, self._hanging, self._clock_s = hangs, until_s, {}, 0.0
        self.submitted, self.said, self.replaced = [], [], []

    def submit(self, worker, block):
        self.submitted.append((worker, block.start))
        if self._hangs(worker, block):
            self._hanging[worker] = block
        else:
            self._coming += right(worker, block)

    def events(self):
        self._clock_s += 10.0
        assert self._clock_s < 1e5, "it waits for ever"
        if self._clock_s >= self._until_s:
            self._coming += [event for item in self._hanging.items() for event in right(*item)]
            self._hanging = {}
        found, self._coming = self._coming, []
        return found

    def silent(self, workers, silent_s, stuck_after_s):
        self.said.append((self._clock_s, workers, silent_s, stuck_after_s))

    def replace(self, worker, reason):
        assert self._hanging.pop(worker), "it had nothing to do"
        self.replaced.append((worker, reason))
        self._coming.append(Joined(f"{worker}+"))

    def now_s(self):
        return self._clock_s


def hang(hangs, total=12, **options):
    written, tally, pool = [], Tally(), HangingPool(hangs, **options)
    dispatch(BlockQueue(total, 0, 2, most_batches=1), pool, writer(written), tally)
    return written, tally, pool


def test_where_every_worker_hangs_it_is_said_and_each_is_replaced_and_each_block_given_out_again_once():
    written, tally, pool = hang(lambda worker, block: block.start >= 4 and not worker.endswith("+"))
    assert written == list(map(float, range(12)))
    ((at_s, workers, silent_s, stuck_after_s),) = pool.said
    assert workers == ("one", "two")
    assert (silent_s, stuck_after_s) == (STUCK_S / 2, STUCK_S)
    assert at_s < STUCK_S, "before they were replaced"
    reason = "it did not answer for 10 min 00 s, and was ended"
    assert pool.replaced == [("one", reason), ("two", reason)]
    assert tally.warnings == [f"{worker} was replaced: {reason}" for worker in ("one", "two")]
    given = [start for _, start in pool.submitted]
    assert sorted(given) == [0, 2, 4, 4, 6, 6, 8, 10]
    assert tally.windows == {"one": 2, "two": 2, "one+": 4, "two+": 4}


def test_before_any_block_has_come_back_slow_workers_are_left_to_work_and_it_is_said_ever_more_rarely():
    written, tally, pool = hang(lambda worker, block: block.start < 4, until_s=5 * SILENT_S)
    assert written == list(map(float, range(12)))
    assert [(silent_s, stuck_after_s) for _, _, silent_s, stuck_after_s in pool.said] == [
        (SILENT_S, None), (4 * SILENT_S, None)
    ]  # fmt: skip
    assert (pool.replaced, tally.warnings) == ([], [])


def test_a_stuck_worker_is_replaced_while_others_work_and_nobody_is_said_to_be_silent():
    written, _, pool = hang(lambda worker, block: worker == "one", total=400)
    assert written == list(map(float, range(400)))
    assert [worker for worker, _ in pool.replaced] == ["one"]
    assert pool.said == []


def test_a_block_that_makes_every_worker_hang_ends_the_run_and_what_was_scored_is_written():
    written, pool = [], HangingPool(lambda worker, block: block.start == 4, workers=("one",))
    with pytest.raises(EngineDied, match=f"Windows 4 to 5 ended {MOST_LOSSES} workers") as found:
        dispatch(BlockQueue(12, 0, 2, most_batches=1), pool, writer(written), Tally())
    assert found.value.cause == "it did not answer for 10 min 00 s, and was ended"
    assert written == [0.0, 1.0, 2.0, 3.0]
    assert [worker for worker, _ in pool.replaced] == ["one", "one+", "one++"]
