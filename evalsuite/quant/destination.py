"""The checkpoint that is written: whole or not there.

Everything goes into ``DESTINATION.partial/``, shard by shard; a shard gets its final name once all its bytes
are on the disk, and the folder gets its own once the last file is. A run that was killed leaves the partial
folder, and the same command goes on after the last finished shard. The safetensors layout is written here
rather than through the library's ``save_file``, which wants a whole shard in memory: names, types and shapes
are known beforehand, so the header is written first and each tensor's bytes go to their place as they come.
https://github.com/huggingface/safetensors#format
"""

import json
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from evalsuite import __version__
from evalsuite.core.errors import ResumeMismatch, StorageError, UsageError
from evalsuite.core.record import QuantizedPart
from evalsuite.core.units import si_bytes
from evalsuite.quant.checkpoint import INDEX, Checkpoint
from evalsuite.quant.plan import ITEM_BYTES, Plan, PlannedShard, TensorInfo
from evalsuite.quant.recipe import Recipe

STATE = ".hlwq-eval"
HEADER_BYTES = 200  # of a tensor's entry in a header and in the index, generously
SPARE_BYTES = 64_000_000  # tokenizer and other files


class ShardWriter:
    """One safetensors file of known content, written in any order."""

    def __init__(self, file: BinaryIO, tensors: list[TensorInfo]) -> None:
        # Wide types first keeps every tensor aligned to its own item size.
        ordered = sorted(tensors, key=lambda info: -ITEM_BYTES[info.dtype])
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._next: dict[str, int] = {}
        self._end: dict[str, int] = {}
        end = 0
        for info in ordered:
            start, end = end, end + info.bytes
            header[info.name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [start, end]}
            self._next[info.name], self._end[info.name] = start, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(struct.pack("<Q", len(text)) + text)
        file.flush()
        self._data_start = 8 + len(text)
        self._file = file

    def append(self, name: str, tensor: Tensor) -> None:
        """Write the next bytes of one tensor, which may come in pieces; `tensor` is on the CPU."""
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        start = self._next[name]
        self._next[name] = start + len(data)
        with storage_errors(Path(self._file.name).parent):
            while data:
                written = os.pwrite(self._file.fileno(), data, self._data_start + start)
                data, start = data[written:], start + written

    def unfinished(self) -> list[str]:
        """Tensors of which not every byte was written, or more than every byte."""
        return [name for name, end in self._end.items() if self._next[name] != end]


class Destination:
    """The partial folder of one quantization, new or resumed.

    Raises:
        UsageError: the destination exists, or lies in the source.
        ResumeMismatch: the partial folder is another quantization's.
        StorageError: the disk has no room for the result.
    """

    def __init__(self, folder: Path, source: Checkpoint, plan: Plan, recipe: Recipe) -> None:
        self.folder = folder.absolute()
        self.partial = self.folder.with_name(self.folder.name + ".partial")
        self._plan = plan
        _refuse_place(self.folder, source.folder)
        state = {"version": __version__, "recipe": recipe.as_dict(), "source": source.identity()}
        self._state = json.loads(json.dumps(state))
        self._refuse_other()
        self._refuse_full_disk()
        with storage_errors(self.partial):
            (self.partial / STATE).mkdir(parents=True, exist_ok=True)
            write_json(self.partial / STATE / "state.json", self._state)

    def finished(self, shard: PlannedShard) -> list[QuantizedPart] | None:
        """The rows of a shard that an earlier run completed, or None."""
        rows = self._rows_file(shard)
        if not rows.is_file():
            return None
        return [QuantizedPart.model_validate(row) for row in json.loads(rows.read_text())]

    @contextmanager
    def shard(self, shard: PlannedShard) -> Iterator[ShardWriter]:
        """Write one shard; it counts as present when its rows are recorded by `complete`."""
        path = self.partial / f"{shard.target}.tmp"
        with storage_errors(self.partial):
            file = path.open("wb")
        with file:
            with storage_errors(self.partial):
                writer = ShardWriter(file, list(shard.outputs))
            yield writer
            if writer.unfinished():
                raise StorageError(f"{shard.target} is incomplete: {', '.join(writer.unfinished()[:3])}.")
            with storage_errors(self.partial):
                os.fsync(file.fileno())
        path.replace(self.partial / shard.target)

    def complete(self, shard: PlannedShard, rows: list[QuantizedPart]) -> None:
        """Record a written shard, after which a resumed run leaves it alone."""
        with storage_errors(self.partial):
            write_json(self._rows_file(shard), [row.model_dump() for row in rows])

    def finish(self, files: dict[str, bytes]) -> None:
        """Add the index and the other files, and give the folder its name."""
        weight_map = {info.name: shard.target for shard in self._plan.shards for info in shard.outputs}
        index = {"metadata": {"total_size": self._plan.bytes_after}, "weight_map": weight_map}
        with storage_errors(self.partial):
            write_json(self.partial / INDEX, index)
            for name, content in files.items():
                (self.partial / name).write_bytes(content)
            self.partial.rename(self.folder)
            shutil.rmtree(self.folder / STATE)

    def _rows_file(self, shard: PlannedShard) -> Path:
        return self.partial / STATE / f"{shard.target}.json"

    def _refuse_other(self) -> None:
        path = self.partial / STATE / "state.json"
        if not self.partial.exists() or (self.partial.is_dir() and not any(self.partial.iterdir())):
            return
        found = json.loads(path.read_text()) if path.is_file() else {}
        different = [key for key in self._state if found.get(key) != self._state[key]]
        if different:
            raise ResumeMismatch(
                f"{self.partial.name} was begun under another {' and '.join(different)}.",
                cause="an earlier quantization into this folder was not finished.",
                todo=f"delete {self.partial}, or choose another destination.",
            )

    def _refuse_full_disk(self) -> None:
        place = next(path for path in self.partial.parents if path.exists())
        done = sum(path.stat().st_size for path in self.partial.glob("*.safetensors"))
        names = sum(1 for _ in self._plan.outputs)
        needed = self._plan.bytes_after + names * HEADER_BYTES + SPARE_BYTES - done
        free = shutil.disk_usage(place).free
        if free < needed:
            raise StorageError(
                f"The result needs {si_bytes(needed)}, and {place} has {si_bytes(free)} free.",
                cause="the disk is too full; nothing was written.",
                todo="free some space, or choose a destination on another disk.",
            )


def _refuse_place(folder: Path, source: Path) -> None:
    resolved, origin = folder.resolve(), source.resolve()
    if resolved == origin or origin in resolved.parents:
        raise UsageError(
            f"The destination {folder.name} is the source, or lies inside it.",
            cause="a source is never written to.",
            todo="choose a folder elsewhere.",
        )
    if folder.exists() or folder.is_symlink():
        raise UsageError(
            f"The destination {folder} exists.",
            cause="nothing is overwritten.",
            todo="choose another folder, or delete this one.",
        )


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name, then rename, so that a reader never sees half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    temporary.replace(path)


@contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Failures of the disk as StorageError, with what is left behind."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"Writing to {folder} failed: {error.strerror or error}.",
            cause="the disk is full, or the folder cannot be written.",
            todo="mend it and run the same command again; finished shards are kept.",
        ) from error
