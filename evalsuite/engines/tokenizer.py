"""The tokenizer of a checkpoint, as the `tokenizers` library runs it.

A ``tokenizer.json`` is read as it is; other kinds (GGUF, sentencepiece) are converted by transformers.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from evalsuite.core.errors import ModelError
from evalsuite.data.models import Checkpoint, find_tokenizer_file


@dataclass(frozen=True)
class LoadedTokenizer:
    """`name` and `sha256` identify it in records; the hash is of its canonical serialisation."""

    tokenizer: Tokenizer
    name: str
    sha256: str

    @property
    def vocabulary(self) -> int:
        """One more than the largest id it can emit."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def load_tokenizer(source: str | None, checkpoint: Checkpoint | None) -> LoadedTokenizer:
    """The tokenizer at `source` (file, folder or hub id) if given, else the checkpoint's own.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    if source is not None:
        name, path = source, find_tokenizer_file(source)
    elif checkpoint is not None:
        name, path = checkpoint.name, checkpoint.folder / "tokenizer.json"
    else:
        raise ModelError("No tokenizer is named.", todo="give --tokenizer or a model.")
    if path is not None and path.is_file() and not (source is None and checkpoint and checkpoint.gguf):
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:
            raise ModelError(f"{path} is not a readable tokenizer.", cause=str(error)) from error
    elif source is None and checkpoint is not None:
        tokenizer = _converted(checkpoint)
    else:
        raise ModelError(
            f"{source} has no tokenizer.json.", todo="give the folder or file of a Hugging Face tokenizer."
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    digest = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    return LoadedTokenizer(tokenizer, Path(name).resolve().name if Path(name).exists() else name, digest)


def _converted(checkpoint: Checkpoint) -> Tokenizer:
    from transformers import AutoTokenizer

    from evalsuite.engines.loading import require_gguf

    options: dict[str, Any] = {}
    if checkpoint.gguf:
        require_gguf()
        options["gguf_file"] = checkpoint.gguf
    try:
        loaded: Any = AutoTokenizer.from_pretrained(str(checkpoint.folder), **options)
        return loaded.backend_tokenizer
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise ModelError(
            f"{checkpoint.name} has no tokenizer that can be read.",
            cause=str(error).splitlines()[0] if str(error) else type(error).__name__,
            todo="name one with --tokenizer FOLDER.",
        ) from error
