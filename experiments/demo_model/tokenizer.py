"""The built-in model's tokenizer: a byte is a token, token 256 is the end of a text.

It is an ordinary `tokenizer.json` (byte-level BPE with no merges), so that AutoTokenizer and every
engine load it without code of ours, and ids are exactly `list(text.encode("utf-8"))`.

    python experiments/demo_model/tokenizer.py evalsuite/demo
"""

import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

END = "<|endoftext|>"
END_ID = 256


def byte_symbols() -> list[str]:
    """GPT-2's printable character for each byte, in byte order.

    Printable Latin-1 stands for itself; the other 68 bytes take the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def build() -> Tokenizer:
    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    # No regex splitting: with no merges it would change nothing and cost time.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    if tokenizer.token_to_id(END) != END_ID:
        raise ValueError(f"{END} is {tokenizer.token_to_id(END)}, expected {END_ID}")
    return tokenizer


def config() -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: tokenizer.py FOLDER")
    folder = Path(sys.argv[1])
    build().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config(), indent=2) + "\n")


if __name__ == "__main__":
    main()
