"""Sums kept and divided once, by values computed by hand; and the scoring loop with a fake engine."""

import math

import numpy as np
import pandas as pd
import pytest

from evalsuite.core.errors import NonFiniteScore, OutOfMemory
from evalsuite.core.protocol import protocol
from evalsuite.data.tokens import TokenStream
from evalsuite.data.windows import plan_windows
from evalsuite.engines.base import WindowScore
from evalsuite.measure.perplexity import (
    ScoringRun,
    score_windows,
    summarise,
)
from evalsuite.store.runs import RunStore

LN2 = math.log(2)


def frame_of(nats, scored, spans=None):
    n = len(nats)
    return pd.DataFrame(
        {"window": range(n), "scored": scored, "bytes": spans or [3] * n, "words": [2] * n, "nats": nats}
    )


class TestArithmetic:
    """Window 0: 4 tokens of 1 bit; window 1: 1 token of 6 bits. Ten bits over five tokens: perplexity 4."""

    FRAME = frame_of([4 * LN2, 6 * LN2], [4, 1], [7, 3])
    SCORING = ScoringRun(2.0, 5, 50, 3, 0)

    def test_by_hand(self):
        result = summarise(self.FRAME, available=9, load_s=1.5, scoring=self.SCORING)
        assert result.perplexity == pytest.approx(4, rel=1e-14)
        assert result.perplexity != pytest.approx(math.exp((LN2 + 6 * LN2) / 2), rel=0.5), "mean of means"
        assert result.bits_per_byte == pytest.approx(1.0, rel=1e-14)
        assert result.word_perplexity == pytest.approx(2**2.5, rel=1e-14)
        assert result.nats == pytest.approx(10 * LN2, rel=1e-14)
        assert (result.windows, result.windows_available, result.scored_tokens) == (2, 9, 5)
        assert (result.scored_bytes, result.scored_words) == (10, 4)
        assert (result.scored_tokens_per_s, result.forward_tokens_per_s) == (2.5, 25.0)
        assert (result.load_s, result.scoring_s, result.batch_size) == (1.5, 2.0, 3)
        assert (result.low, result.high) == (None, None), "two windows have no interval"

    def test_a_resumed_run_with_nothing_left_to_score(self):
        result = summarise(self.FRAME, available=2, load_s=0, scoring=ScoringRun(0.0, 0, 0, 3, 2))
        assert (result.scored_tokens_per_s, result.forward_tokens_per_s) == (0, 0)
        assert result.resumed_from_window == 2

    def test_a_text_without_white_space_has_no_word_perplexity(self):
        """Chinese, or base64: a word may be longer than a run, or the text a single one."""
        none = self.FRAME.assign(words=[0, 0])
        assert summarise(none, available=2, load_s=0, scoring=self.SCORING).word_perplexity is None
        one = frame_of([3000.0, 3000.0], [1000, 1000]).assign(words=[1, 0])
        result = summarise(one, available=2, load_s=0, scoring=self.SCORING)
        assert result.word_perplexity is None, "e^6000 is no number"
        assert result.perplexity == pytest.approx(math.exp(3))


class FakeScorer:
    """Scores window i with i + 1 nats a token, if no more than `fits` windows come at once."""

    def __init__(self, fits=10**9, largest=4, bad=None):
        self.fits, self.largest, self.bad = fits, largest, bad
        self.batches = []

    def largest_batch(self, window):
        return self.largest

    def score(self, windows):
        if len(windows) > self.fits:
            raise OutOfMemory(f"A batch of {len(windows)} windows does not fit.")
        self.batches.append([w.index for w in windows])
        if self.bad in self.batches[-1]:
            raise NonFiniteScore(f"Window {self.bad}")
        return [WindowScore(w.index, np.full(w.scored, w.index + 1.0)) for w in windows]


class Watcher:
    def __init__(self):
        self.seen = []

    def phase(self, text):
        pass

    def scored(self, done, total, perplexity):
        self.seen.append((done, total, perplexity))


@pytest.fixture
def setting(tmp_path):
    """Ten disjoint windows of eight tokens, and a folder; `again` opens the folder as a new process does."""
    stream = TokenStream(np.arange(85), np.full(85, 3), np.arange(85) % 2)
    windows = plan_windows(85, protocol("gptq").override(8))
    assert len(windows) == 10
    store, identity = RunStore(tmp_path), {"scored_tokens": 70}
    folders = []

    def again():
        while folders:
            folders.pop().close()
        folders.append(store.begin("ppl", "fake", "0" * 12, identity, "auto"))
        return folders[0]

    yield stream, windows, again
    while folders:
        folders.pop().close()


def run(setting, scorer, batch=None, folder=None):
    stream, windows, again = setting
    folder, watcher = folder or again(), Watcher()
    return score_windows(scorer, stream, windows, folder, batch, watcher), folder, watcher


class TestTheLoop:
    def test_every_window_once_in_order(self, setting):
        scorer = FakeScorer()
        scoring, folder, watcher = run(setting, scorer)
        assert scorer.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        assert [row["window"] for row in folder.rows] == list(range(10))
        assert [row["nats"] for row in folder.rows] == [7.0 * (i + 1) for i in range(10)]
        assert [row["bytes"] for row in folder.rows] == [21] * 10
        assert folder.rows[0]["words"] == 4  # the odd ones of 1 … 7
        assert folder.rows[1]["words"] == 4  # of 9 … 15
        assert (scoring.scored_tokens, scoring.forward_tokens) == (70, 80)
        assert (scoring.batch_size, scoring.resumed_from_window, scoring.warnings) == (4, 0, ())
        assert [done for done, _, _ in watcher.seen] == [0, 4, 8, 10]
        assert {total for _, total, _ in watcher.seen} == {10}
        assert math.isnan(watcher.seen[0][2])
        assert watcher.seen[-1][2] == pytest.approx(math.exp(5.5))

    @pytest.mark.parametrize(
        ("fits", "sizes"), [(3, [2] * 5), (1, [1] * 10), (4, [4, 4, 2]), (7, [4, 4, 2]), (2, [2] * 5)]
    )
    def test_a_batch_that_does_not_fit_is_halved(self, setting, fits, sizes):
        scorer = FakeScorer(fits=fits)
        scoring, folder, _ = run(setting, scorer)
        assert [len(batch) for batch in scorer.batches] == sizes
        assert [i for batch in scorer.batches for i in batch] == list(range(10))
        assert [row["nats"] for row in folder.rows] == [7.0 * (i + 1) for i in range(10)]
        assert scoring.batch_size == sizes[0]
        assert len(scoring.warnings) == {3: 1, 1: 2, 2: 1}.get(fits, 0)
        if fits == 1:
            assert scoring.warnings[-1] == "a batch of 2 windows did not fit; went on with 1"

    def test_one_window_that_does_not_fit_ends_the_run(self, setting):
        with pytest.raises(OutOfMemory):
            run(setting, FakeScorer(fits=0))

    def test_what_was_scored_before_an_error_is_kept_and_resumed(self, setting):
        _, _, again = setting
        folder = again()
        with pytest.raises(NonFiniteScore, match="Window 5"):
            run(setting, FakeScorer(bad=5), folder=folder)
        assert [row["window"] for row in folder.rows] == [0, 1, 2, 3]
        scorer = FakeScorer(largest=3)  # a machine that judges otherwise now
        scoring, folder, watcher = run(setting, scorer)
        assert scorer.batches == [[4, 5, 6, 7], [8, 9]], "the batch size of the beginning is kept"
        assert scoring.resumed_from_window == 4
        assert (scoring.scored_tokens, scoring.forward_tokens) == (42, 48)
        assert watcher.seen[0][:2] == (4, 10)
        assert watcher.seen[0][2] == pytest.approx(math.exp(2.5))
        assert len(folder.rows) == 10

    def test_resuming_a_run_with_all_windows(self, setting):
        run(setting, FakeScorer())
        scorer = FakeScorer()
        scoring, folder, _ = run(setting, scorer)
        assert scorer.batches == []
        assert (scoring.resumed_from_window, scoring.scored_tokens, len(folder.rows)) == (10, 0, 10)

    def test_an_explicit_batch_size_is_taken(self, setting):
        scorer = FakeScorer(largest=1)
        scoring, _, _ = run(setting, scorer, batch=5)
        assert [len(batch) for batch in scorer.batches] == [5, 5]
        assert scoring.batch_size == 5
