"""A text as token ids, with the UTF-8 bytes and words that each token accounts for."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

Bos = Literal["never", "text", "each-window"]


@dataclass(frozen=True)
class TokenStream:
    """One text, tokenised once.

    Attributes:
        ids: token ids, int64 [n].
        bytes: UTF-8 bytes a token accounts for, int64 [n]; they sum to the size of the text.
        words: words that start within a token, int64 [n]; words are cut at white space.
        window_bos: id that replaces the first token of each window, or None.
    """

    ids: NDArray[np.int64]
    bytes: NDArray[np.int64]
    words: NDArray[np.int64]
    window_bos: int | None = None

    def __len__(self) -> int:
        return len(self.ids)


def default_bos(tokenizer: Tokenizer) -> int | None:
    """The id that the tokenizer puts before a text by default; None if it adds none."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    return whole[0] if whole[: len(plain)] != plain else None


def tokenise(tokenizer: Tokenizer, text: str, bos: Bos) -> TokenStream:
    """Encode the whole text in one piece: cutting it first would change tokens at the seams."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    encoding: Any = tokenizer.encode(text, add_special_tokens=False)
    ids = np.asarray(encoding.ids, dtype=np.int64)
    # tokens that split one character all report its span; the running maximum gives its bytes to the first
    ends = np.maximum.accumulate(np.asarray([end for _, end in encoding.offsets], dtype=np.int64))
    if len(ends):
        ends[-1] = len(text)
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
    blank = np.frombuffer(bytes(c.isspace() for c in text), dtype=np.bool_)
    starts_word = ~blank & np.concatenate([[True], blank[:-1]])
    stream_bytes = np.diff(_prefix(widths)[ends], prepend=0)
    stream_words = np.diff(_prefix(starts_word)[ends], prepend=0)
    token = default_bos(tokenizer) if bos != "never" else None
    if bos == "text" and token is not None:
        ids = np.concatenate([[token], ids])
        stream_bytes = np.concatenate([[0], stream_bytes])
        stream_words = np.concatenate([[0], stream_words])
    return TokenStream(ids, stream_bytes, stream_words, token if bos == "each-window" else None)


def _prefix(values: NDArray[Any]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
