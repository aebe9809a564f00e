"""The texts that are scored, each under its own name and hash.

WikiText-2 is the raw test split of Merity et al., https://arxiv.org/abs/1609.07843, as published at
https://huggingface.co/datasets/Salesforce/wikitext (CC BY-SA 3.0 and GFDL). It is loaded, never shipped.
"""

import hashlib
import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from evalsuite.core.errors import CorpusError, first_line

HUB_DATASET = ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
DATA_VARIABLE = "HLWQ_EVAL_DATA"
WIKITEXT2_JOINED_SHA256 = "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83"
KNOWN_RAW_FILES = {
    "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08": "wikitext-2",
    "4cd0f6876d07a413aa911261ff6d363c72d757d47f0fdd6015702014c89cb9c7": "wikitext-2-valid",
}
# the whole test split, joined by blank lines; counted with each tokenizer
WIKITEXT2_TOKENS = {"Qwen3.5": 297_193, "Qwen3 and Qwen2.5": 299_078}
RAW_FILE = "wiki.test.raw"
PLACES_IN_FOLDER = (RAW_FILE, f"wikitext-2-raw/{RAW_FILE}", f"wikitext-2/{RAW_FILE}")


@dataclass(frozen=True)
class Corpus:
    """Rows of text under a name that they have earned.

    Attributes:
        name: ``wikitext-2``, ``wikitext-2-valid``, ``builtin``, or ``file:NAME``.
        source: where the rows came from, for the record; no absolute path.
        rows: as the hub's dataset has them for WikiText-2; the whole text as one row for a file.
    """

    name: str
    source: str
    rows: tuple[str, ...]

    def text(self, join: Literal["blank-line", "raw"]) -> str:
        """The rows as one text. ``raw`` gives back the original file of a WikiText split."""
        if join == "blank-line":
            return "\n\n".join(self.rows)
        if self.name.startswith("wikitext-2"):
            return "".join(row or " \n" for row in self.rows)
        return "".join(self.rows)


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def load_corpus(name: str) -> Corpus:
    """The corpus called `name`: ``wikitext-2``, ``builtin`` or the path of a text file.

    Raises:
        CorpusError: it cannot be had, is not UTF-8, or is not what its name says.
    """
    if name == "builtin":
        return _builtin()
    if name == "wikitext-2":
        return _wikitext2()
    return _from_file(Path(name))


def local_wikitext2() -> Path | None:
    """The raw test split in the folder that HLWQ_EVAL_DATA names; None where the variable is unset.

    Raises:
        CorpusError: the variable is set and the file is not there.
    """
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        return None
    for place in PLACES_IN_FOLDER:
        if (found := Path(folder) / place).is_file():
            return found
    raise CorpusError(
        f"{DATA_VARIABLE} names {folder}, which holds no {RAW_FILE}.",
        todo=f"put the raw WikiText-2 test split there as {RAW_FILE}, or unset {DATA_VARIABLE}.",
    )


def _builtin() -> Corpus:
    import platform
    from pydoc_data.topics import topics

    rows = tuple(topics[key] for key in sorted(topics))
    return Corpus("builtin", f"pydoc_data.topics of CPython {platform.python_version()}", rows)


def _wikitext2() -> Corpus:
    if path := local_wikitext2():
        corpus = _from_file(path)
        if corpus.name != "wikitext-2":
            raise CorpusError(
                f"{path} is not the raw WikiText-2 test split.",
                cause=f"the SHA-256 of its rows, joined, is {sha256_text(corpus.text('blank-line'))[:16]}…, "
                f"not {WIKITEXT2_JOINED_SHA256[:16]}….",
                todo="replace it with the original wiki.test.raw, or score it under its own name "
                f"with --corpus {path}.",
            )
        return corpus
    return _wikitext2_from_hub()


def _wikitext2_from_hub() -> Corpus:
    datasets: Any = import_module("datasets")  # heavy, and not needed for local texts

    # HTTPError is the HTTP client's own, which datasets lets through
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    path, config, split = HUB_DATASET
    try:
        dataset: Any = datasets.load_dataset(path, config, split=split)
    except (OSError, ValueError, HTTPError, datasets.exceptions.DatasetsError) as error:
        raise CorpusError(
            f"WikiText-2 could not be loaded from the hub ({path}, {config}).",
            cause=first_line(error),
            todo=f"set {DATA_VARIABLE} to a folder with {RAW_FILE}, give --corpus FILE, "
            "or use --corpus builtin, which needs no download.",
        ) from error
    rows = tuple(dataset["text"])
    found = sha256_text("\n\n".join(rows))
    if found != WIKITEXT2_JOINED_SHA256:
        raise CorpusError(
            f"{path} ({config}, {split}) on the hub is not the text that the protocol names.",
            cause=f"{len(rows)} rows whose joined SHA-256 is {found[:16]}…, "
            f"not {WIKITEXT2_JOINED_SHA256[:16]}….",
            todo="clear the cached copy of the dataset, or give the original file with --corpus FILE.",
        )
    return Corpus("wikitext-2", f"hub {path} {config} {split}", rows)


def _from_file(path: Path) -> Corpus:
    if not path.is_file():
        raise CorpusError(
            f"No corpus is called {str(path)!r}, and no file of that name exists.",
            todo="choose wikitext-2, builtin, or the path of a UTF-8 text file.",
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path} cannot be read.", cause=first_line(error)) from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path} is not UTF-8 text (byte {error.start}).", todo="convert it to UTF-8 first."
        ) from error
    if not text.strip():
        raise CorpusError(f"{path} holds no text.", todo="give a text file with something in it.")
    if known := KNOWN_RAW_FILES.get(hashlib.sha256(data).hexdigest()):
        return Corpus(known, f"file {path.name}", wikitext_rows(text))
    if hashlib.sha256(data.replace(b"\r\n", b"\n")).hexdigest() in KNOWN_RAW_FILES:
        raise CorpusError(
            f"{path} is a WikiText-2 split whose line ends were changed to CRLF.",
            cause="a Windows editor or git's autocrlf; every line end would cost an extra token.",
            todo="restore LF line ends (dos2unix), or take the original file.",
        )
    return Corpus(f"file:{path.name}", f"file {path.name}", (text,))


def wikitext_rows(raw: str) -> tuple[str, ...]:
    """The rows of the hub's dataset, rebuilt from the original file: one a line, blank ones empty.

    Lines end at ``"\\n"`` alone: ``str.splitlines`` would also cut at characters inside the text.
    """
    return tuple("" if not line.strip() else line + "\n" for line in raw.split("\n")[:-1])
