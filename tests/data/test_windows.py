"""Windows against counts computed elsewhere, a simulated Hugging Face loop, and properties of them all."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from evalsuite.core.errors import UsageError
from evalsuite.core.protocol import PROTOCOLS, WindowProtocol, protocol
from evalsuite.data.corpora import WIKITEXT2_TOKENS, load_corpus
from evalsuite.data.tokens import TokenStream, tokenise
from evalsuite.data.windows import Window, count_windows, cut, plan_windows, window

QWEN35 = 297_193

# (protocol, context, stride) -> windows, scored tokens at 297,193 tokens; computed by hand:
# full windows ⌊(T − context)/stride⌋ + 1 of `stride` tokens; disjoint ones lose their first token;
# the Hugging Face loop scores all but the first token; llama.cpp scores 512 − 256 − 1 a window
COUNTS = {
    ("card-1155", None, None): (1155, 295_680),
    ("card-1155", 2048, 256): (1153, 295_168),
    ("paper", None, None): (577, 295_424),
    ("gptq", None, None): (145, 145 * 2047),
    ("llama.cpp", None, None): (580, 580 * 255),
    ("hf", 2048, 256): (1154, QWEN35 - 1),
    ("hf", None, None): (578, QWEN35 - 1),
}


@pytest.mark.parametrize(("choice", "counts"), COUNTS.items(), ids=str)
def test_counts_at_the_length_of_wikitext2(
    choice: tuple[str, int | None, int | None], counts: tuple[int, int]
):
    name, context, stride = choice
    chosen = protocol(name).override(context, stride)
    windows = plan_windows(QWEN35, chosen)
    assert (len(windows), sum(w.scored for w in windows)) == counts
    assert count_windows(QWEN35, chosen) == counts[0]


@pytest.fixture(scope="module")
def real_streams(
    wikitext_folder: Path, qwen_tokenizer_folder: Path
) -> Callable[[WindowProtocol], TokenStream]:
    corpus = load_corpus(str(wikitext_folder / "wiki.test.raw"))
    tokenizer = Tokenizer.from_file(str(qwen_tokenizer_folder / "tokenizer.json"))
    cache: dict[str, TokenStream] = {}

    def stream(chosen: WindowProtocol) -> TokenStream:
        if chosen.join not in cache:  # Qwen3.5 adds no BOS, so the join alone decides
            cache[chosen.join] = tokenise(tokenizer, corpus.text(chosen.join), chosen.bos)
        return cache[chosen.join]

    return stream


@pytest.mark.parametrize(("choice", "counts"), COUNTS.items(), ids=str)
def test_counts_on_the_real_text_with_the_real_tokenizer(
    real_streams: Callable[[WindowProtocol], TokenStream],
    choice: tuple[str, int | None, int | None],
    counts: tuple[int, int],
):
    name, context, stride = choice
    chosen = protocol(name).override(context, stride)
    stream = real_streams(chosen)
    if chosen.join == "blank-line":
        assert len(stream) == QWEN35 == WIKITEXT2_TOKENS["Qwen3.5"]
    windows = plan_windows(len(stream), chosen)
    assert (len(windows), sum(w.scored for w in windows)) == counts


def hugging_face_loop(tokens: int, max_length: int, stride: int) -> list[tuple[int, int, list[int]]]:
    """The loop of huggingface.co/docs/transformers/perplexity: start, stop and scored positions of each step.

    Labels before the last `trg_len` are −100; the loss shifts labels by one, so a window's first token never
    counts. A step without any label left adds nothing.
    """
    steps: list[tuple[int, int, list[int]]] = []
    prev_end_loc = 0
    for begin_loc in range(0, tokens, stride):
        end_loc = min(begin_loc + max_length, tokens)
        trg_len = end_loc - prev_end_loc
        labels = [position >= end_loc - trg_len for position in range(begin_loc, end_loc)]
        scored = [begin_loc + i for i, counts in enumerate(labels) if counts and i > 0]
        if scored:
            steps.append((begin_loc, end_loc, scored))
        prev_end_loc = end_loc
        if end_loc == tokens:
            break
    return steps


@given(tokens=st.integers(2, 3000), context=st.integers(2, 700), stride=st.integers(1, 700))
@example(tokens=2049, context=1024, stride=1024)
@example(tokens=2048, context=1024, stride=1024)
@example(tokens=2, context=2, stride=1)
def test_hf_gives_the_windows_of_the_hugging_face_loop(tokens: int, context: int, stride: int):
    assume(stride <= context)
    windows = plan_windows(tokens, protocol("hf").override(context, stride))
    found = [(w.start, w.stop, list(range(w.first_scored, w.stop))) for w in windows]
    assert found == hugging_face_loop(tokens, context, stride)


@st.composite
def plans(draw: st.DrawFn) -> tuple[int, WindowProtocol, list[Window]]:
    """A preset, overridden as the command line can, on a text of some length."""
    preset = draw(st.sampled_from(list(PROTOCOLS.values())))
    context = draw(st.integers(2, 300))
    stride = draw(st.none() | st.integers(1, 300))
    try:
        chosen = preset.override(context, stride)
    except UsageError:
        assume(False)
    tokens = draw(st.integers(2, 2000))
    assume(count_windows(tokens, chosen))
    return tokens, chosen, plan_windows(tokens, chosen)


def times_scored(tokens: int, windows: list[Window]) -> np.ndarray:
    times = np.zeros(tokens, dtype=int)
    for w in windows:
        times[w.first_scored : w.stop] += 1
    return times


@given(plans())
def test_no_token_is_scored_twice(plan: tuple[int, WindowProtocol, list[Window]]):
    tokens, _, windows = plan
    assert times_scored(tokens, windows).max() <= 1


@given(plans())
def test_every_window_scores_something_with_context_before_it(
    plan: tuple[int, WindowProtocol, list[Window]],
):
    tokens, chosen, windows = plan
    for w in windows:
        assert 0 <= w.start < w.first_scored < w.stop <= tokens
        assert w.scored >= 1
        assert w.length <= chosen.context


@given(plans())
def test_windows_and_scored_ranges_come_in_text_order(plan: tuple[int, WindowProtocol, list[Window]]):
    _, chosen, windows = plan
    assert [w.index for w in windows] == list(range(len(windows)))
    assert [w.start for w in windows] == [i * chosen.stride for i in range(len(windows))]
    for before, after in pairwise(windows):
        assert before.stop <= after.first_scored
        if chosen.scored == "stride" and not chosen.disjoint:
            assert before.stop == after.first_scored  # no token between them is left out


@given(plans())
def test_full_windows_but_for_a_tail_that_is_kept(plan: tuple[int, WindowProtocol, list[Window]]):
    tokens, chosen, windows = plan
    assert all(w.length == chosen.context for w in windows[:-1])
    if chosen.tail == "drop":
        assert windows[-1].length == chosen.context
        assert tokens - windows[-1].stop < chosen.stride
    else:
        # one token alone in a disjoint window has no context, and no window either
        assert windows[-1].stop == tokens - (chosen.disjoint and tokens % chosen.context == 1)


@given(plans())
def test_what_the_last_tokens_of_a_window_score(plan: tuple[int, WindowProtocol, list[Window]]):
    _, chosen, windows = plan
    for w in windows:
        if chosen.scored == "second-half":
            assert w.scored == chosen.context - chosen.context // 2 - 1
        elif chosen.first_window == "like-others":
            assert w.scored == min(chosen.stride, chosen.context - 1)


@given(tokens=st.integers(2, 2000), context=st.integers(2, 300), stride=st.integers(1, 299))
def test_hf_scores_every_token_but_the_first(tokens: int, context: int, stride: int):
    assume(stride < context)
    times = times_scored(tokens, plan_windows(tokens, protocol("hf").override(context, stride)))
    assert times[0] == 0
    assert (times[1:] == 1).all()


def test_a_first_window_of_2048_is_not_counted_as_one_stride():
    """A fault seen in public scripts: all 2,047 tokens of the first window count, not 512."""
    first = window(0, 10_000, protocol("hf"))
    assert (first.first_scored, first.scored) == (1, 2047)
    assert window(0, 10_000, protocol("paper")).scored == 512


@given(plans(), st.integers(1, 50))
def test_a_limit_takes_the_first_windows(plan: tuple[int, WindowProtocol, list[Window]], limit: int):
    tokens, chosen, windows = plan
    assert plan_windows(tokens, chosen, limit) == windows[:limit]


@given(
    tokens=st.integers(2, 400),
    context=st.integers(2, 200),
    stride=st.integers(1, 200),
    first=st.sampled_from(["like-others", "whole"]),
    tail=st.sampled_from(["drop", "short"]),
)
def test_no_valid_protocol_scores_a_negative_number_of_tokens(
    tokens: int, context: int, stride: int, first: str, tail: str
):
    try:
        chosen = WindowProtocol.model_validate(
            {"name": "x", "context": context, "stride": stride, "first_window": first, "tail": tail}
        )
    except ValueError:
        assume(False)
    for index in range(count_windows(tokens, chosen)):
        assert window(index, tokens, chosen).scored > 0


@pytest.mark.parametrize("name", ["card-1155", "gptq", "llama.cpp", "paper"])
def test_a_text_shorter_than_a_window_is_refused(name: str):
    chosen = protocol(name)
    assert count_windows(chosen.context - 1, chosen) == 0
    assert count_windows(chosen.context, chosen) == 1
    with pytest.raises(UsageError) as caught:
        plan_windows(chosen.context - 1, chosen)
    assert f"{chosen.context - 1:,} tokens" in caught.value.what
    assert f"{chosen.context:,}" in caught.value.what
    assert "--context" in caught.value.todo


@pytest.mark.parametrize("tokens", [0, 1])
def test_hf_needs_two_tokens(tokens: int):
    with pytest.raises(UsageError, match=f"The text has {tokens} tokens"):
        plan_windows(tokens, protocol("hf"))


class TestCut:
    def stream(self, bos: int | None) -> TokenStream:
        ids = np.arange(100, 140, dtype=np.int64)
        return TokenStream(ids, np.ones_like(ids), np.zeros_like(ids), bos)

    def test_the_tokens_of_each_window(self):
        chosen = protocol("card-1155").override(8, 3)
        windows = plan_windows(40, chosen)
        for w, tokens in zip(windows, cut(self.stream(None), windows), strict=True):
            assert tokens.index == w.index
            assert tokens.ids.tolist() == list(range(100 + w.start, 100 + w.stop))
            assert tokens.ids[tokens.offset :].tolist() == list(range(100 + w.first_scored, 100 + w.stop))
            assert tokens.scored == w.scored

    def test_a_bos_in_each_window_replaces_its_first_token_only(self):
        chosen = protocol("llama.cpp").override(8)
        stream = self.stream(7)
        windows = plan_windows(40, chosen)
        for w, tokens in zip(windows, cut(stream, windows), strict=True):
            assert tokens.ids.tolist() == [7, *range(101 + w.start, 100 + w.stop)]
            assert tokens.offset > 0  # the BOS itself is never scored
        assert stream.ids.tolist() == list(range(100, 140))
