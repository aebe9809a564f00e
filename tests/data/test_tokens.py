"""Bytes and words by token, and the BOS that a tokenizer adds."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from evalsuite.data.tokens import TokenStream, default_bos, tokenise

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
AWKWARD = (
    "", " ", "a", "\n\n\n", "\x00\x00", "x\r\ny\x0bz\x1c w", "a\u00a0b", "\ufeffx",
    "e\u0301a\u0300", "\u2126 \u212b", "\ufdfa \ufdfd", "\ud55c\uae00 \u1100\u1161",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 x", "日本語 テスト",
    "<|endoftext|> a <|endoftext|>",
)  # fmt: skip


@pytest.fixture(scope="module")
def demo(demo_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(demo_folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def qwen(qwen_tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(qwen_tokenizer_folder / "tokenizer.json"))


def check_sums(tokenizer: Tokenizer, text: str) -> TokenStream:
    stream = tokenise(tokenizer, text, "never")
    assert len(stream) == len(stream.ids) == len(stream.bytes) == len(stream.words)
    assert stream.ids.dtype == stream.bytes.dtype == stream.words.dtype == np.int64
    assert stream.ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids
    assert stream.bytes.sum() == len(text.encode())
    assert stream.words.sum() == len(text.split())
    assert (stream.bytes >= 0).all()
    assert (stream.words >= 0).all()
    assert stream.window_bos is None
    return stream


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_texts(demo: Tokenizer, text: str):
    check_sums(demo, text)


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_texts_with_a_normalising_tokenizer(qwen: Tokenizer, text: str):
    check_sums(qwen, text)


@settings(max_examples=150, deadline=None)
@given(text=texts)
def test_sums_on_any_text(demo: Tokenizer, text: str):
    check_sums(demo, text)


@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_sums_on_any_text_with_a_normalising_tokenizer(qwen: Tokenizer, text: str):
    check_sums(qwen, text)


def byte_lengths(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """A byte-level vocabulary writes each byte as one character, special tokens as they are."""
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokens = [tokenizer.id_to_token(i) for i in ids]
    return [len(token.encode() if token in special else token) for token in tokens]


@settings(max_examples=150, deadline=None)
@given(text=texts)
@example(text="日本")
@example(text="a👩b")
def test_each_token_has_its_own_bytes_up_to_whole_characters(demo: Tokenizer, text: str):
    """Where tokens split a character, the first of them takes all of its bytes: at most 3 too early."""
    stream = check_sums(demo, text)
    true = np.cumsum(byte_lengths(demo, stream.ids.tolist()))
    given_so_far = np.cumsum(stream.bytes)
    assert ((given_so_far - true >= 0) & (given_so_far - true <= 3)).all()
    if text.isascii():
        assert given_so_far.tolist() == true.tolist()


@pytest.mark.parametrize("text", ["Hello, world! 12345 of them.", "\n\n = Robert Boulter = \n\n\n\n He is\n"])
def test_each_token_has_its_own_bytes_in_plain_english(qwen: Tokenizer, text: str):
    stream = check_sums(qwen, text)
    assert stream.bytes.tolist() == byte_lengths(qwen, stream.ids.tolist())


def test_a_word_belongs_to_the_token_it_starts_in(qwen: Tokenizer):
    stream = tokenise(qwen, "one  two\nthree four", "never")
    pieces = [qwen.id_to_token(i) for i in stream.ids]
    starts = {piece: int(n) for piece, n in zip(pieces, stream.words, strict=True)}
    assert starts == {"one": 1, "Ġ": 0, "Ġtwo": 1, "Ċ": 0, "three": 1, "Ġfour": 1}


def small_tokenizer(template: str | None) -> Tokenizer:
    tokenizer = Tokenizer(
        models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "<unk>": 4}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return tokenizer


@pytest.mark.parametrize(
    ("template", "bos"), [("<s> $A", 0), ("<s> $A </s>", 0), ("$A </s>", None), (None, None)]
)
def test_the_bos_is_what_the_tokenizer_puts_first(template: str | None, bos: int | None):
    assert default_bos(small_tokenizer(template)) == bos


class TestBos:
    TEXT = "a b  a"

    def test_never(self):
        stream = tokenise(small_tokenizer("<s> $A </s>"), self.TEXT, "never")
        assert stream.ids.tolist() == [2, 3, 2]
        assert stream.window_bos is None

    def test_once_before_the_text(self):
        stream = tokenise(small_tokenizer("<s> $A </s>"), self.TEXT, "text")
        assert stream.ids.tolist() == [0, 2, 3, 2]
        assert stream.bytes.tolist() == [0, 1, 2, 3]
        assert stream.words.tolist() == [0, 1, 1, 1]
        assert stream.window_bos is None

    def test_in_each_window(self):
        stream = tokenise(small_tokenizer("<s> $A"), self.TEXT, "each-window")
        assert stream.ids.tolist() == [2, 3, 2]
        assert stream.window_bos == 0

    @pytest.mark.parametrize("bos", ["text", "each-window"])
    def test_none_where_the_tokenizer_adds_none(self, bos: str):
        stream = tokenise(small_tokenizer("$A </s>"), self.TEXT, bos)  # type: ignore[arg-type]
        assert stream.ids.tolist() == [2, 3, 2]
        assert stream.window_bos is None

    def test_qwen_and_the_built_in_model_add_none(self, demo: Tokenizer, qwen: Tokenizer):
        assert default_bos(demo) is None
        assert default_bos(qwen) is None


def test_a_tokenizer_that_truncates_or_pads_is_told_not_to():
    tokenizer = small_tokenizer("<s> $A")
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    assert tokenise(tokenizer, "a b a b", "never").ids.tolist() == [2, 3, 2, 3]


def test_the_text_is_encoded_in_one_piece(qwen: Tokenizer):
    """Cut into chunks, tokens at the seams would change."""
    text = "internationalization " * 300
    whole = tokenise(qwen, text, "never").ids.tolist()
    halves = [tokenise(qwen, part, "never").ids.tolist() for part in (text[:3005], text[3005:])]
    assert whole == qwen.encode(text).ids
    assert halves[0] + halves[1] != whole
