"""The checkpoint that is read: safetensors shards, checked before use and opened one at a time."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from evalsuite.core.errors import ModelError
from evalsuite.engines.dequantize import is_quantized
from evalsuite.quant.plan import ITEM_BYTES, TensorInfo

CODED = (".weight_packed", ".weight_scale", ".weight_codes", ".qweight")
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """An unquantized checkpoint in a folder.

    Attributes:
        config: the parsed config.json.
        shards: for each file the tensors in it, in the order in which they are stored.
    """

    folder: Path
    config: Mapping[str, Any]
    shards: Mapping[str, tuple[TensorInfo, ...]]

    def identity(self) -> dict[str, Any]:
        """What a resumed run compares: the files' sizes and times, and the configuration."""
        files = {name: (self.folder / name).stat() for name in self.shards}
        return {
            "config_sha256": hashlib.sha256((self.folder / "config.json").read_bytes()).hexdigest(),
            "shards": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in files.items()},
        }

    @contextmanager
    def open(self, shard: str) -> Iterator["ShardReader"]:
        """Open one file; what was read stays mapped only until it is closed."""
        with safe_open(self.folder / shard, "pt") as file:
            yield ShardReader(file)


@dataclass(frozen=True)
class ShardReader:
    """An open file of a checkpoint."""

    file: Any

    def pieces(self, info: TensorInfo, limit: int) -> Iterator[Tensor]:
        """A tensor in pieces of at most `limit` values along its first dimension (one entry at least)."""
        if not info.shape:
            yield self.file.get_tensor(info.name)
            return
        step = max(1, limit // max(1, info.count // max(1, info.shape[0])))
        view = self.file.get_slice(info.name)
        for start in range(0, info.shape[0], step):
            yield view[start : start + step]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's configuration and headers.

    Raises:
        ModelError: it is no safetensors checkpoint, is quantized already, or is incomplete or damaged.
    """
    config = _config(folder)
    if is_quantized(config):
        raise ModelError(
            f"{folder.name} is quantized already.",
            cause="its config.json has a quantization_config; quantizing twice adds up the errors.",
            todo="start from the unquantized checkpoint.",
        )
    return Checkpoint(folder, config, {name: _tensors(folder, name) for name in _shard_names(folder)})


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
        return config if isinstance(config, dict) else {}
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelError(
            f"{folder} is no checkpoint: it has no config.json.",
            todo="give the folder that holds config.json and the safetensors files.",
        ) from error
    except ValueError as error:
        raise ModelError(f"config.json in {folder.name} is not JSON.", cause=str(error)) from error


def _shard_names(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{INDEX} in {folder.name} is no index of safetensors shards.",
                cause=f"it is damaged or cut short ({error}).",
                todo="download the checkpoint again.",
            ) from error
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        raise ModelError(
            f"{folder.name} holds no safetensors weights.",
            cause=f"its weights are pickles ({pickles[0]}), which can run code when read." if pickles else "",
            todo="convert them with transformers: from_pretrained, then save_pretrained." if pickles else "",
        )
    numbered = re.fullmatch(r"(.*)-\d+-of-(\d+)\.safetensors", names[0])
    if numbered:
        total = int(numbered[2])
        width = len(numbered[2])
        series = {f"{numbered[1]}-{i + 1:0{width}d}-of-{numbered[2]}.safetensors" for i in range(total)}
        names = sorted(series.union(names))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{folder.name} lacks {len(missing)} of its {len(names)} shards: {', '.join(missing[:3])}.",
            cause="the download was cut short, or a file was moved.",
            todo="download the checkpoint again.",
        )
    return names


def _tensors(folder: Path, shard: str) -> tuple[TensorInfo, ...]:
    try:
        with safe_open(folder / shard, "pt") as file:
            views = {name: file.get_slice(name) for name in file.offset_keys()}
            infos = tuple(
                TensorInfo(name, view.get_dtype(), tuple(view.get_shape())) for name, view in views.items()
            )
    except SafetensorError as error:
        raise ModelError(
            f"{shard} in {folder.name} cannot be read.",
            cause=f"it is damaged or cut short ({error}).",
            todo="download the checkpoint again.",
        ) from error
    for info in infos:
        if info.dtype not in ITEM_BYTES or info.name.endswith(CODED):
            raise ModelError(
                f"{folder.name} is quantized already: {info.name} is stored as {info.dtype}.",
                todo="start from the unquantized checkpoint.",
            )
    return infos
