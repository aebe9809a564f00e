"""Comparisons: refused where runs are unlike, exact where the shift is known."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from evalsuite.core.errors import NotComparable
from evalsuite.core.record import Record
from evalsuite.measure.divergence import compare, require_comparable, summarise_divergence

GOLDEN = Path(__file__).parents[1] / "golden" / "record.json"
N = 60


@pytest.fixture
def record():
    return Record.model_validate_json(GOLDEN.read_text())


def frame(nats, scored=None):
    return pd.DataFrame({"window": range(len(nats)), "scored": scored or [4] * len(nats), "nats": nats})


@pytest.fixture
def nats():
    return np.random.default_rng(2).gamma(30, 0.3, N)


def other(record, part, **changes):
    return record.model_copy(update={part: getattr(record, part).model_copy(update=changes)})


class TestWhatMayBeCompared:
    def test_another_model_on_another_machine(self, record):
        candidate = other(
            other(record, "model", name="b", dtype="float32", fingerprint="0"), "machine", cpu="x"
        )
        assert require_comparable(record, candidate) == (record.results, record.results)

    def test_the_name_of_a_protocol_does_not_matter(self, record):
        require_comparable(record, other(record, "protocol", name="card-1155*"))

    @pytest.mark.parametrize(
        ("part", "changes", "named"),
        [
            ("text", {"corpus": "builtin"}, "text: wikitext-2 (cd34) against builtin (cd34)"),
            ("text", {"sha256": "ffff"}, "text: wikitext-2 (cd34) against wikitext-2 (ffff)"),
            ("text", {"tokenizer_sha256": "9999"}, "tokenizer: ef56 against 9999"),
            ("protocol", {"stride": 128}, "'stride': 128"),
            ("protocol", {"bos": "text"}, "'bos': 'text'"),
            ("results", {"windows": 200}, "windows: 1155 against 200"),
        ],
    )
    def test_a_difference_is_named(self, record, part, changes, named):
        with pytest.raises(NotComparable) as error:
            require_comparable(record, other(record, part, **changes))
        assert named in error.value.cause
        assert error.value.exit_code == 2
        assert error.value.todo

    def test_every_difference_is_named(self, record):
        candidate = other(other(record, "text", sha256="f", tokenizer_sha256="f"), "results", windows=3)
        with pytest.raises(NotComparable) as error:
            require_comparable(record, candidate)
        assert [word in error.value.cause for word in ("text:", "tokenizer:", "windows:", "protocol:")] == [
            True, True, True, False
        ]  # fmt: skip

    @pytest.mark.parametrize("changes", [{"status": "interrupted"}, {"results": None}])
    def test_an_unfinished_run(self, record, changes):
        with pytest.raises(NotComparable, match="not a finished perplexity run"):
            require_comparable(record, record.model_copy(update=changes))


class TestDelta:
    def test_a_shift_of_every_token(self, record, nats):
        """The text's own variation cancels: the interval of a constant shift has no width."""
        result = compare(record, record, (frame(nats), frame(nats + 4 * 0.01)), None, "none kept")
        assert result.delta_ln_ppl == pytest.approx(0.01, rel=1e-9)
        assert result.low == pytest.approx(0.01, rel=1e-9)
        assert result.high == pytest.approx(0.01, rel=1e-9)
        assert result.p_value < 0.001
        assert (result.windows, result.scored_tokens) == (N, 4 * N)
        assert (result.divergence, result.divergence_absent) == (None, "none kept")

    def test_the_difference_of_the_logarithms_on_unequal_windows(self, record, nats):
        scored = [1 + i % 7 for i in range(N)]
        changed = nats + np.random.default_rng(3).normal(0.02, 0.5, N)
        result = compare(record, record, (frame(nats, scored), frame(changed, scored)), None, None)
        ln_ppl = [math.fsum(x) / sum(scored) for x in (nats, changed)]
        assert result.delta_ln_ppl == pytest.approx(ln_ppl[1] - ln_ppl[0], rel=1e-9)
        assert result.low < result.delta_ln_ppl < result.high
        back = compare(record, record, (frame(changed, scored), frame(nats, scored)), None, None)
        assert back.delta_ln_ppl == pytest.approx(-result.delta_ln_ppl, rel=1e-9)

    def test_a_run_against_itself(self, record, nats):
        same = np.zeros(4 * N), np.ones(4 * N, bool)
        result = compare(record, record, (frame(nats), frame(nats)), same, None)
        assert (result.delta_ln_ppl, result.low, result.high, result.p_value) == (0, 0, 0, 1)
        assert result.divergence is not None
        assert (result.divergence.mean, result.divergence.p99, result.divergence.top1_agreement) == (0, 0, 1)

    def test_few_windows_have_no_interval(self, record, nats):
        result = compare(record, record, (frame(nats[:5]), frame(nats[:5] + 1)), None, None)
        assert (result.low, result.high, result.p_value) == (None, None, None)
        assert result.delta_ln_ppl == pytest.approx(0.25)


def test_divergence_by_hand():
    kl = np.arange(101.0)
    agree = np.arange(101) % 4 != 0
    found = summarise_divergence(kl, agree, [1] * 21 + [8] * 10)
    assert (found.tokens, found.mean, found.median, found.p99) == (101, 50, 50, 99)
    assert found.top1_agreement == pytest.approx(75 / 101)
    assert found.top1_agreement_low < 75 / 101 < found.top1_agreement_high
