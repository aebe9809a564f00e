"""The queue of blocks against a plain statement of what it promises, under any order of events."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evalsuite.cluster.blocks import MOST_LOSSES, STUCK, STUCK_S, Block, BlockQueue
from evalsuite.core.errors import EngineDied, OutOfMemory


def queue(total=12, done=0, batch=2, workers=2, **options):
    made = BlockQueue(total, done, batch, **options)
    for _ in range(workers):
        made.join()
    return made


@settings(deadline=None, max_examples=200)
@given(
    total=st.integers(1, 60),
    batch=st.integers(1, 7),
    batches_done=st.integers(0, 3),
    workers=st.integers(1, 6),
    held=st.integers(1, 16),
    choices=st.randoms(use_true_random=False),
)
def test_every_window_leaves_once_in_order_and_in_the_batches_of_one_machine(
    total, batch, batches_done, workers, held, choices
):
    done = min(total, batch * batches_done)
    made = queue(total, done, batch, workers, held=held, patience_s=0.0)
    free, busy, now, out, lost = [f"w{i}" for i in range(workers)], {}, 0.0, [], 0
    while not made.finished:
        now += choices.random()
        choices.shuffle(free)
        while free and (block := made.take(free[-1], now)) is not None:
            assert (block.start - done) % batch == 0
            assert block.stop == total or block.windows % batch == 0
            assert block.batch == batch
            busy[free.pop()] = block
        assert busy, "somebody always has something to do"
        worker = choices.choice(sorted(busy))
        block = busy.pop(worker)
        if lost < MOST_LOSSES - 1 and choices.random() < 0.2:
            lost += 1
            made.lost(worker, "by script")
            made.join()
            free.append(f"{worker}+")
            continue
        for left, result in made.done(worker, block, range(block.start, block.stop), now):
            assert list(range(left.start, left.stop)) == list(result)
            out += result
        free.append(worker)
    assert out == list(range(done, total))


def test_a_block_returned_twice_counts_once():
    made = queue()
    first, second = made.take("a", 0.0), made.take("b", 0.0)
    assert [left for left, _ in made.done("a", first, "one", 1.0)] == [first]
    assert made.done("a", first, "again", 1.1) == []
    assert made.repeats == 1
    assert made.done("b", second, "two", 1.2) == [(second, "two")]
    assert made.frontier == 4


def test_a_lost_block_is_handed_out_again_before_any_later_one():
    made = queue()
    first, second = made.take("a", 0.0), made.take("b", 0.0)
    made.lost("a", "by script")
    assert made.take("c", 1.0) == first
    assert made.take("d", 1.0).start == second.stop
    assert made.done("b", second, "two", 2.0) == []
    assert [result for _, result in made.done("c", first, "one", 2.0)] == ["one", "two"]


def test_a_block_that_costs_several_workers_ends_the_run():
    made = queue()
    for number in range(MOST_LOSSES - 1):
        made.take(f"w{number}", 0.0)
        made.lost(f"w{number}", "by script")
    made.take("last", 0.0)
    with pytest.raises(EngineDied, match="Windows 0 to 1 ended 3 workers"):
        made.lost("last", "by script")


def test_a_late_block_gets_a_second_worker_and_the_first_answer_counts():
    made = queue(total=4, patience_s=5.0)
    slow, quick = made.take("slow", 0.0), made.take("quick", 0.0)
    assert made.done("quick", quick, "quick", 1.0) == []
    assert made.take("quick", 4.9) is None, "it is not late yet"
    assert made.take("quick", 5.0) == slow
    assert made.take("third", 14.9) is None, "two are enough for twice as long"
    assert [result for _, result in made.done("quick", slow, "second", 6.0)] == ["second", "quick"]
    assert made.finished
    assert made.done("slow", slow, "first", 40.0) == []


def test_a_late_block_goes_before_new_ones_so_that_what_waits_for_it_gets_to_the_disk():
    made = queue(total=10_000, workers=2, patience_s=10.0)
    stuck, now, left = made.take("stuck", 0.0), 0.0, []
    while not left:
        now += 1.0
        assert now < 15.0, "what waits for the stuck worker stays in memory"
        left = made.done("quick", made.take("quick", now - 1.0), None, now)
    assert left[0][0] == stuck
    assert made.frontier == left[-1][0].stop == made.take("quick", now).start


def test_no_number_of_stuck_workers_holds_the_run_up_while_one_works():
    made = queue(total=4, workers=5, patience_s=1.0)
    stuck, quick = made.take("stuck0", 0.0), made.take("quick", 0.0)
    made.done("quick", quick, None, 0.1)
    late_s = 0.0
    for number in range(1, 4):
        late_s += 2.0 ** (number - 1)
        assert made.take(f"stuck{number}", late_s - 0.01) is None
        assert made.take(f"stuck{number}", late_s) == stuck
    assert made.take("quick", late_s + 8.0) == stuck
    assert len(made.done("quick", stuck, None, late_s + 9.0)) == 2
    assert made.finished


def test_a_repeated_block_has_batches_of_the_size_that_fits_by_now():
    made = queue(total=8, batch=4, patience_s=0.0)
    stuck, second = made.take("stuck", 0.0), made.take("b", 0.0)
    assert made.too_large("b", second, OutOfMemory("too large")) == 2
    assert made.take("b", 0.1) == Block(4, 8, 2)
    made.done("b", Block(4, 8, 2), None, 0.2)
    assert made.take("b", 99.0) == Block(stuck.start, stuck.stop, 2)


def test_losing_one_of_two_workers_on_a_block_keeps_it_with_the_other():
    made = queue(total=4, patience_s=0.0)
    slow, quick = made.take("slow", 0.0), made.take("quick", 0.0)
    made.done("quick", quick, "quick", 1.0)
    assert made.take("quick", 9.0) == slow
    made.lost("slow", "by script")
    assert made.take("third", 9.1) is None, "it is not late with the other yet"
    assert len(made.done("quick", slow, "second", 10.0)) == 2


def test_no_more_than_so_many_finished_windows_wait_for_an_earlier_block():
    made = queue(total=100, batch=1, held=3, workers=1, most_batches=1)
    made.take("slow", 0.0)
    for _ in range(3):
        assert made.done("quick", made.take("quick", 0.0), "done", 0.1) == []
    assert made.take("quick", 0.2) is None


def test_a_batch_that_does_not_fit_makes_later_ones_smaller():
    made = queue(total=8, batch=4)
    first = made.take("a", 0.0)
    assert made.too_large("a", first, OutOfMemory("too large")) == 2
    assert made.take("a", 0.1) == Block(0, 4, 2)
    assert made.take("b", 0.1).batch == 2
    assert made.too_large("a", Block(0, 4, 2), OutOfMemory("too large")) == 1
    with pytest.raises(OutOfMemory):
        made.too_large("a", Block(0, 4, 1), OutOfMemory("too large"))


def test_blocks_grow_to_seconds_and_shrink_towards_the_end():
    made = queue(total=10_000, batch=2, workers=10, most_batches=64)
    first = made.take("a", 0.0)
    assert first.windows == 2
    made.done("a", first, None, 0.02)  # 10 ms a window: 200 windows in two seconds, in 64 batches at most
    sizes = []
    while block := made.take("a", 0.0):
        sizes.append(block.windows)
        made.done("a", block, None, 0.01 * block.windows)
    assert sizes[0] == 128
    assert sizes[-1] == 2
    assert sizes == sorted(sizes, reverse=True)


def test_who_has_a_block_for_too_long_is_stuck_and_it_is_handed_out_again_once():
    made = queue(total=40, workers=3, most_batches=1)
    first, second = made.take("a", 0.0), made.take("b", 1.0)
    assert made.stuck(1e9) == {}, "nothing is known of how long a block takes"
    third = made.take("c", 2.0)
    made.done("c", third, None, 4.0)
    fourth = made.take("c", 4.0)
    assert made.stuck(STUCK_S - 0.1) == {}
    assert made.stuck(STUCK_S) == {"a": STUCK_S}
    assert made.stuck(STUCK_S + 2.0) == {"a": STUCK_S + 2.0, "b": STUCK_S + 1.0}
    for worker in ("a", "b"):
        made.lost(worker, "by script")
    assert list(made.held) == ["c"]
    assert [made.take(worker, STUCK_S + 2.0) for worker in ("d", "e")] == [first, second]
    assert made.take("f", STUCK_S + 2.0) == Block(fourth.stop, fourth.stop + 2, 2), "neither goes out again"


def test_a_slow_model_gives_its_workers_more_time():
    made = queue(workers=2, most_batches=1)
    first = made.take("a", 0.0)
    made.done("a", first, None, 2 * STUCK_S)
    late = made.take("a", 2 * STUCK_S)
    assert made.stuck_after_s(late) == STUCK * 2 * STUCK_S
    assert made.stuck(2 * STUCK_S + STUCK * 2 * STUCK_S - 1.0) == {}
    assert list(made.stuck(2 * STUCK_S + STUCK * 2 * STUCK_S)) == ["a"]


def test_a_stuck_worker_whose_block_another_one_did_is_found_and_costs_nothing():
    made = queue(total=4, workers=2, most_batches=1)
    stuck, quick = made.take("stuck", 0.0), made.take("quick", 0.0)
    made.done("quick", quick, None, 1.0)
    assert made.take("quick", 20.0) == stuck
    made.done("quick", stuck, None, 21.0)
    assert list(made.stuck(STUCK_S)) == ["stuck"]
    made.lost("stuck", "by script")
    assert made.finished
    assert made.take("next", STUCK_S) is None
