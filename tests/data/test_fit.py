"""From a card's counts back to protocols."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evalsuite.core.protocol import WindowProtocol, protocol
from evalsuite.data.windows import COMMON_CONTEXTS, COMMON_STRIDES, fit_protocols, plan_windows


def counts(tokens: int, chosen: WindowProtocol) -> tuple[int, int]:
    """By listing every window."""
    windows = plan_windows(tokens, chosen)
    return len(windows), sum(w.scored for w in windows)


def test_the_cards_counts_fit_one_stride_and_a_range_of_contexts():
    fits = fit_protocols(1155, 295_680, 297_193)
    assert len(fits) == 1
    fit = fits[0]
    assert fit.contexts == (1514, 1769)
    assert (fit.protocol.context, fit.protocol.stride) == (1536, 256)
    assert fit.tokens == 297_193
    assert fit.protocol.first_window == "like-others"
    assert fit.protocol.tail == "drop"


def test_the_range_of_contexts_is_the_whole_of_it():
    (fit,) = fit_protocols(1155, 295_680, 297_193)
    low, high = fit.contexts
    for context in (low, high):
        assert counts(297_193, protocol("card-1155").override(context)) == (1155, 295_680)
    for context in (low - 1, high + 1):
        assert counts(297_193, protocol("card-1155").override(context)) != (1155, 295_680)


def test_another_tokenizer_needs_another_context():
    """299,078 tokens with Qwen3's: ⌊(299,078 − context)/256⌋ = 1,154 for contexts from 3,399 to 3,654."""
    (fit,) = fit_protocols(1155, 295_680, 299_078)
    assert fit.contexts == (3399, 3654)
    assert fit.contexts[0] <= fit.protocol.context <= fit.contexts[1]


@pytest.mark.parametrize(
    ("windows", "scored", "name", "context", "stride"),
    [
        (145, 145 * 2047, "gptq", 2048, 2048),
        (580, 580 * 255, "llama.cpp", 512, 512),
        (578, 297_192, "hf", 2048, 512),
        (1154, 297_192, "hf", 2048, 256),
        (577, 295_424, "full windows", 2048, 512),
    ],
)
def test_the_counts_of_known_protocols_find_them(
    windows: int, scored: int, name: str, context: int, stride: int
):
    found = {
        f.protocol.name: f for f in fit_protocols(windows, scored, 297_193) if f.protocol.stride == stride
    }
    assert found[name].contexts[0] <= context <= found[name].contexts[1]


def test_impossible_counts_fit_nothing():
    assert fit_protocols(1155, 295_681, 297_193) == []
    assert fit_protocols(10**6, 10**9, 297_193) == []


@st.composite
def families(draw: st.DrawFn) -> tuple[int, WindowProtocol]:
    """A text of some length with at least two windows, and a protocol out of those that are tried."""
    preset = protocol(draw(st.sampled_from(["card-1155", "hf", "gptq", "llama.cpp"])))
    context = draw(st.sampled_from([*COMMON_CONTEXTS, 384, 640, 2304]))
    if preset.disjoint:
        context = draw(st.sampled_from(COMMON_CONTEXTS))
        chosen = preset.override(context)
    else:
        strides = [s for s in COMMON_STRIDES if s < context]
        chosen = preset.override(context, draw(st.sampled_from(strides)))
    return draw(st.integers(context + chosen.stride, 100_000)), chosen


@settings(max_examples=40, deadline=None)
@given(families())
def test_a_protocol_fits_its_own_counts(case: tuple[int, WindowProtocol]):
    tokens, chosen = case
    windows, scored = counts(tokens, chosen)
    same = [
        fit
        for fit in fit_protocols(windows, scored, tokens)
        if fit.protocol.stride == chosen.stride
        and fit.contexts[0] <= chosen.context <= fit.contexts[1]
        and fit.protocol.first_window == chosen.first_window
        and fit.protocol.scored == chosen.scored
    ]
    assert same


@settings(max_examples=25, deadline=None)
@given(families())
def test_whatever_fits_has_the_counts_by_listing(case: tuple[int, WindowProtocol]):
    tokens, chosen = case
    wanted = counts(tokens, chosen)
    for fit in fit_protocols(*wanted, tokens):
        for context in (fit.protocol.context, *fit.contexts):
            assert counts(tokens, fit.protocol.model_copy(update={"context": context})) == wanted


@pytest.mark.timeout(3)
@pytest.mark.parametrize(("windows", "scored", "tokens"), [(1, 999, 1000), (0, 0, 100), (1, 1, 2)])
def test_a_text_shorter_than_the_contexts_tried_ends(windows: int, scored: int, tokens: int):
    """The Hugging Face loop has one window for every context beyond the text: the range must be bounded."""
    for fit in fit_protocols(windows, scored, tokens):
        assert fit.contexts[1] <= 10**6
