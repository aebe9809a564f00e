"""Jobs over GPUs: none twice at once, order kept, all ended by the first failure."""

import threading
import time

import pytest

from evalsuite.run.lanes import Claim, Lanes


def run(claims, work, abort=lambda: None):
    stop = threading.Event()
    Lanes(work, stop, abort).run(claims)
    return stop


class Log:
    """What ran when."""

    def __init__(self, claims):
        self.gpus = {c.job: c.gpus for c in claims}
        self.running, self.began, self.clashes, self.most = [], [], [], 0
        self.lock = threading.Lock()

    def __call__(self, job, others):
        with self.lock:
            self.clashes += [
                (job, o) for o in self.running
                if set(self.gpus[job]) & set(self.gpus[o]) or not self.gpus[job] or not self.gpus[o]
            ]  # fmt: skip
            self.running.append(job)
            self.began.append(job)
            self.most = max(self.most, len(self.running))
        time.sleep(0.02)
        with self.lock:
            self.running.remove(job)


def test_two_gpus_work_at_once_and_never_on_two_jobs():
    claims = [Claim((i % 2,), i) for i in range(8)] + [Claim((0, 1), 8), Claim((), 9), Claim((1,), 10)]
    log = Log(claims)
    run(claims, log)
    assert sorted(log.began) == list(range(11))
    assert log.clashes == []
    assert log.most == 2


def test_one_gpu_keeps_the_order():
    claims = [Claim((0,), i) for i in range(5)]
    log = Log(claims)
    run(claims, log)
    assert log.began == [0, 1, 2, 3, 4]
    assert log.most == 1


def test_jobs_without_gpus_run_one_by_one():
    claims = [Claim((), i) for i in range(4)]
    log = Log(claims)
    run(claims, log)
    assert (log.began, log.most) == ([0, 1, 2, 3], 1)


def test_both_of_two_jobs_hear_of_each_other_and_of_later_ones_when_they_ask_again():
    told, both, third = {}, threading.Barrier(2), threading.Event()

    def work(job, beside):
        if job == "third":
            third.set()
            return
        both.wait(5)
        told[job] = [beside()]
        both.wait(5)
        if job == "long":
            assert third.wait(5)
            told[job] += [beside(), beside()]

    run([Claim((0,), "long"), Claim((1, 2), "short"), Claim((2,), "third")], work)
    assert told["short"] == [(0,)]
    assert told["long"][:2] == [(1, 2), (1, 2)]  # the third began while the short one's GPUs counted still
    assert set(told["long"][2]) <= {2}


def test_a_job_that_was_alone_hears_of_nobody():
    told = []
    run([Claim((0,), 1), Claim((0,), 2)], lambda job, beside: told.append(beside()))
    assert told == [(), ()]


def test_the_first_failure_ends_the_others_and_is_raised():
    ended = threading.Event()

    def work(job, others):
        if job == "bad":
            raise RuntimeError("no")
        assert ended.wait(10), "it was never ended"

    later = []
    claims = [Claim((0,), "good"), Claim((1,), "bad"), Claim((1,), "later")]
    with pytest.raises(RuntimeError, match="no"):
        run(claims, lambda j, o: later.append(j) if j == "later" else work(j, o), ended.set)
    assert ended.is_set()
    assert later == []
