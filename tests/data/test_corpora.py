"""Texts under names that they have earned."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalsuite.core.errors import CorpusError
from evalsuite.data.corpora import (
    DATA_VARIABLE,
    HUB_DATASET,
    KNOWN_RAW_FILES,
    WIKITEXT2_JOINED_SHA256,
    Corpus,
    load_corpus,
    local_wikitext2,
    sha256_text,
    wikitext_rows,
)

# published beside the data, not computed by this package
RAW_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
JOINED_SHA256 = "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83"


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATA_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def wikitext(wikitext_folder: Path) -> Corpus:
    return load_corpus(str(wikitext_folder / "wiki.test.raw"))


class TestWikiText2:
    def test_the_raw_file_under_its_right_name(self, wikitext: Corpus):
        assert wikitext.name == "wikitext-2"
        assert wikitext.source == "file wiki.test.raw"

    def test_rows_are_the_hubs(self, wikitext: Corpus):
        assert len(wikitext.rows) == 4358
        assert wikitext.rows[:3] == ("", " = Robert Boulter = \n", "")
        assert WIKITEXT2_JOINED_SHA256 == JOINED_SHA256
        assert hashlib.sha256("\n\n".join(wikitext.rows).encode()).hexdigest() == JOINED_SHA256

    def test_the_blank_line_join_is_the_text_that_is_pinned(self, wikitext: Corpus):
        assert sha256_text(wikitext.text("blank-line")) == JOINED_SHA256

    @pytest.mark.parametrize(
        ("file", "name"), [("wiki.test.raw", "wikitext-2"), ("wiki.valid.raw", "wikitext-2-valid")]
    )
    def test_the_raw_join_gives_the_file_back(self, wikitext_folder: Path, file: str, name: str):
        path = wikitext_folder / file
        if not path.is_file():
            pytest.skip(f"no {file} beside the checkout")
        corpus = load_corpus(str(path))
        assert corpus.name == name
        assert corpus.text("raw").encode() == path.read_bytes()

    def test_the_file_is_known_by_its_bytes(self, wikitext_folder: Path, wikitext: Corpus, tmp_path: Path):
        assert KNOWN_RAW_FILES[RAW_SHA256] == "wikitext-2"
        copy = tmp_path / "some other name.txt"
        copy.write_bytes((wikitext_folder / "wiki.test.raw").read_bytes())
        found = load_corpus(str(copy))
        assert (found.name, found.rows) == ("wikitext-2", wikitext.rows)
        assert found.source == "file some other name.txt"

    def test_a_crlf_copy_is_refused_by_name(self, wikitext_folder: Path, tmp_path: Path):
        copy = tmp_path / "wiki.test.raw"
        copy.write_bytes((wikitext_folder / "wiki.test.raw").read_bytes().replace(b"\n", b"\r\n"))
        with pytest.raises(CorpusError) as caught:
            load_corpus(str(copy))
        assert "CRLF" in caught.value.what
        assert "autocrlf" in caught.value.cause
        assert "dos2unix" in caught.value.todo

    def test_one_changed_byte_is_another_text(self, wikitext_folder: Path, tmp_path: Path):
        data = bytearray((wikitext_folder / "wiki.test.raw").read_bytes())
        data[1000] ^= 1
        copy = tmp_path / "wiki.test.raw"
        copy.write_bytes(data)
        assert load_corpus(str(copy)).name == "file:wiki.test.raw"


class TestDataFolder:
    @pytest.mark.parametrize("place", ["", "wikitext-2-raw", "wikitext-2"])
    def test_the_folder_that_the_variable_names(
        self, wikitext_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
    ):
        (tmp_path / place).mkdir(exist_ok=True)
        target = tmp_path / place / "wiki.test.raw"
        target.symlink_to((wikitext_folder / "wiki.test.raw").resolve())
        monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
        assert local_wikitext2() == target
        corpus = load_corpus("wikitext-2")
        assert (corpus.name, len(corpus.rows)) == ("wikitext-2", 4358)
        assert str(tmp_path) not in corpus.source

    def test_unset_is_no_folder(self, monkeypatch: pytest.MonkeyPatch):
        assert local_wikitext2() is None
        monkeypatch.setenv(DATA_VARIABLE, "")
        assert local_wikitext2() is None

    @pytest.mark.parametrize("kind", ["empty folder", "missing folder", "file"])
    def test_a_folder_without_it_is_an_error_and_not_the_hub(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ):
        place = tmp_path / "data"
        if kind == "empty folder":
            place.mkdir()
        elif kind == "file":
            place.write_text("x")
        monkeypatch.setenv(DATA_VARIABLE, str(place))
        with pytest.raises(CorpusError) as caught:
            load_corpus("wikitext-2")
        assert DATA_VARIABLE in caught.value.what
        assert str(place) in caught.value.what
        assert "wiki.test.raw" in caught.value.todo
        assert f"unset {DATA_VARIABLE}" in caught.value.todo

    def test_another_text_under_that_file_name_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        (tmp_path / "wiki.test.raw").write_text("some other text\n")
        monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
        with pytest.raises(CorpusError) as caught:
            load_corpus("wikitext-2")
        assert "not the raw WikiText-2 test split" in caught.value.what
        assert sha256_text("some other text\n")[:16] in caught.value.cause  # what was found
        assert JOINED_SHA256[:16] in caught.value.cause
        assert "--corpus" in caught.value.todo

    def test_the_validation_split_under_that_file_name_is_refused(
        self, wikitext_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        valid = wikitext_folder / "wiki.valid.raw"
        if not valid.is_file():
            pytest.skip("no wiki.valid.raw beside the checkout")
        (tmp_path / "wiki.test.raw").write_bytes(valid.read_bytes())
        monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
        with pytest.raises(CorpusError, match="not the raw WikiText-2 test split"):
            load_corpus("wikitext-2")

    def test_a_crlf_copy_there_is_refused_by_name(
        self, wikitext_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        data = (wikitext_folder / "wiki.test.raw").read_bytes().replace(b"\n", b"\r\n")
        (tmp_path / "wiki.test.raw").write_bytes(data)
        monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
        with pytest.raises(CorpusError, match="CRLF"):
            load_corpus("wikitext-2")


class TestFiles:
    def test_a_text_file_is_one_row_under_its_own_name(self, tmp_path: Path):
        path = tmp_path / "notes.txt"
        path.write_text("first\n\nsecond\u2028third\n", encoding="utf-8")
        corpus = load_corpus(str(path))
        assert corpus == Corpus("file:notes.txt", "file notes.txt", ("first\n\nsecond\u2028third\n",))
        assert corpus.text("blank-line") == corpus.text("raw") == "first\n\nsecond\u2028third\n"

    def test_line_ends_of_other_files_are_left_alone(self, tmp_path: Path):
        (tmp_path / "dos.txt").write_bytes(b"a\r\nb\r\n")
        assert load_corpus(str(tmp_path / "dos.txt")).text("raw") == "a\r\nb\r\n"

    @pytest.mark.parametrize("name", ["wikitext2", "nowhere.txt", "no/such/file"])
    def test_a_missing_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(CorpusError) as caught:
            load_corpus(name)
        assert name in caught.value.what
        assert "wikitext-2, builtin" in caught.value.todo

    def test_a_folder_is_no_corpus(self, tmp_path: Path):
        with pytest.raises(CorpusError, match="no file of that name"):
            load_corpus(str(tmp_path))

    @pytest.mark.parametrize("data", [b"", b" \n\t\n", "\u3000\n".encode()])
    def test_a_file_without_text(self, tmp_path: Path, data: bytes):
        (tmp_path / "blank.txt").write_bytes(data)
        with pytest.raises(CorpusError, match="holds no text"):
            load_corpus(str(tmp_path / "blank.txt"))

    @pytest.mark.parametrize(
        ("data", "at"), [(b"caf\xe9", 3), ("text".encode("utf-16"), 0), (b"ok\n" * 9 + b"\xff", 27)]
    )
    def test_what_is_not_utf8_is_refused_naming_the_byte(self, tmp_path: Path, data: bytes, at: int):
        (tmp_path / "latin.txt").write_bytes(data)
        with pytest.raises(CorpusError, match=rf"not UTF-8 text \(byte {at}\)") as caught:
            load_corpus(str(tmp_path / "latin.txt"))
        assert "UTF-8" in caught.value.todo

    def test_a_file_that_may_not_be_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        (tmp_path / "secret.txt").write_text("x")

        def refuse(self: Path) -> bytes:
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(CorpusError, match=r"secret\.txt"):
            load_corpus(str(tmp_path / "secret.txt"))


class TestBuiltin:
    def test_it_is_the_text_inside_cpython(self):
        from pydoc_data.topics import topics

        corpus = load_corpus("builtin")
        assert corpus.name == "builtin"
        assert corpus.rows == tuple(topics[key] for key in sorted(topics))
        version = ".".join(map(str, sys.version_info[:3]))
        assert corpus.source == f"pydoc_data.topics of CPython {version}"

    def test_its_hash_is_of_the_joined_text(self):
        corpus = load_corpus("builtin")
        assert len(corpus.text("raw")) > 400_000
        assert (
            sha256_text(corpus.text("blank-line"))
            == hashlib.sha256("\n\n".join(corpus.rows).encode()).hexdigest()
        )
        assert sha256_text(load_corpus("builtin").text("raw")) == sha256_text(corpus.text("raw"))

    def test_a_file_of_that_name_does_not_take_its_place(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "builtin").write_text("impostor")
        assert load_corpus("builtin").name == "builtin"


class TestRows:
    def test_blank_lines_are_empty_and_others_keep_their_line_end(self):
        assert wikitext_rows(" \n = A = \n \n text \n") == ("", " = A = \n", "", " text \n")

    def test_lines_end_at_newlines_alone(self):
        odd = "a\u2028b\x0bc\x0cd\x1ce\x85f\rg\n"
        assert wikitext_rows(odd) == (odd,)

    @given(st.lists(st.text("ab \u2028\r", min_size=1).filter(str.strip) | st.just(" "), max_size=20))
    def test_raw_join_inverts_the_rows(self, lines: list[str]):
        raw = "".join(line + "\n" for line in lines)
        assert Corpus("wikitext-2", "", wikitext_rows(raw)).text("raw") == raw


class TestHub:
    """What `datasets` answers is replaced, and what it raises."""

    @pytest.fixture
    def hub(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[Any]]:
        def answer(with_what: Any) -> list[Any]:
            calls: list[Any] = []

            def load_dataset(*args: Any, **kwargs: Any) -> Any:
                calls.append((args, kwargs))
                if isinstance(with_what, Exception):
                    raise with_what
                return {"text": with_what}

            monkeypatch.setattr(datasets, "load_dataset", load_dataset)
            return calls

        return answer

    def test_the_rows_of_the_hub_are_taken_as_they_are(
        self, wikitext: Corpus, hub: Callable[[Any], list[Any]]
    ):
        calls = hub(list(wikitext.rows))
        corpus = load_corpus("wikitext-2")
        assert (corpus.name, corpus.rows) == ("wikitext-2", wikitext.rows)
        assert corpus.source == "hub Salesforce/wikitext wikitext-2-raw-v1 test"
        assert calls == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"})]
        assert HUB_DATASET == ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")

    def test_other_rows_are_refused_with_what_was_found(self, hub: Callable[[Any], list[Any]]):
        hub(["one\n", "two\n"])
        with pytest.raises(CorpusError) as caught:
            load_corpus("wikitext-2")
        assert "2 rows" in caught.value.cause
        assert sha256_text("one\n\n\ntwo\n")[:16] in caught.value.cause
        assert JOINED_SHA256[:16] in caught.value.cause
        assert "--corpus FILE" in caught.value.todo

    @pytest.mark.parametrize(
        "error",
        [
            ConnectionError("Couldn't reach 'Salesforce/wikitext' on the Hub (LocalEntryNotFoundError)"),
            FileNotFoundError(
                "Dataset 'Salesforce/wikitext' doesn't exist on the Hub or cannot be accessed."
            ),
            ValueError("BuilderConfig 'wikitext-2-raw-v1' not found."),
            ConnectionError(),  # without a text
            TimeoutError(),
        ],
        ids=repr,
    )
    def test_network_trouble_says_what_to_do(self, hub: Callable[[Any], list[Any]], error: Exception):
        hub(error)
        with pytest.raises(CorpusError) as caught:
            load_corpus("wikitext-2")
        assert "could not be loaded from the hub" in caught.value.what
        assert str(error) in caught.value.cause
        for way_out in (DATA_VARIABLE, "--corpus FILE", "--corpus builtin"):
            assert way_out in caught.value.todo
        assert caught.value.exit_code == 2

    def test_an_http_error_says_what_to_do(self, hub: Callable[[Any], list[Any]]):
        """A proxy that hangs up: `datasets` 5 lets the HTTP client's own error through."""
        from huggingface_hub.errors import HTTPError  # the client's base class, whichever it is

        hub(HTTPError("Server disconnected without sending a response."))
        with pytest.raises(CorpusError, match="could not be loaded from the hub"):
            load_corpus("wikitext-2")

    def test_a_broken_download_says_what_to_do(self, hub: Callable[[Any], list[Any]]):
        """DatasetGenerationError and its like are neither OSError nor ValueError."""
        hub(datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset"))
        with pytest.raises(CorpusError, match="could not be loaded from the hub"):
            load_corpus("wikitext-2")
