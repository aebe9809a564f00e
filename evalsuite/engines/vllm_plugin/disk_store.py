"""The experts of an engine in one file, repacked for vLLM's kernels, written once and read ever after.

The file is that of `evalsuite.experts.files`; its name tells the checkpoint, the record's fields, and the
release and rank that the repacking was for. vLLM hands over one layer after the other, while the file's
writer asks for one after the other: the writer has a thread of its own, and the two meet at each layer. Where
the file exists already the writer never asks, and nothing but the slots is repacked.

Experts come out of it in two ways: for a policy on the host through `evalsuite.experts.store.Staging`, and
for one on the GPU through `file_readers`.
"""

import hashlib
import os
import queue
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evalsuite.data.models import Checkpoint, find_checkpoint
from evalsuite.experts.files import OpenFile, cache_folder, open_or_write, read_records
from evalsuite.experts.header import Header
from evalsuite.experts.layout import Field, RecordLayout
from evalsuite.experts.store import Staging, memory_of

if TYPE_CHECKING:
    from evalsuite.engines.vllm_plugin.copies import Copies, FileMailbox, Loads

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
SCRATCH = 8  # records between the file and the slots
POLL_S = 0.05
ABANDON_S = 10.0  # the writer may wait for that of another process


class ExpertFile:
    """The file of one engine's process, being written or found while vLLM loads.

    Args:
        header: what it holds.
        layout: of a record.
        device: where the slots are.
        folder: of the files; `cache_folder()` by default.
        sharers: processes on this machine that each read a file of their own.
    """

    def __init__(
        self, header: Header, layout: RecordLayout, device: torch.device, folder: Path | None = None,
        sharers: int = 1,
    ) -> None:  # fmt: skip
        self.header, self.layout, self.device, self._sharers = header, layout, device, sharers
        self._asked: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._given: queue.SimpleQueue[Tensor | BaseException] = queue.SimpleQueue()
        self._file: OpenFile | None = None
        self._error: BaseException | None = None
        self._closing = ExitStack()
        weakref.finalize(self, self._closing.close)
        self._writer = threading.Thread(
            target=self._open, args=(cache_folder() if folder is None else folder,), daemon=True
        )
        self._writer.start()

    def _open(self, folder: Path) -> None:
        try:
            self._file = open_or_write(self.header, folder, self._layer)
            self._closing.callback(os.close, self._file.descriptor)
        except BaseException as error:  # noqa: BLE001 (raised again in the thread that loads)
            self._error = error

    def _layer(self, layer: int) -> memoryview:
        self._asked.put(layer)
        given = self._given.get()
        if isinstance(given, BaseException):
            raise RuntimeError("vLLM's loading failed before this layer came") from given
        return memory_of(given)

    def offer(self, layer: int, records: Callable[[], Tensor]) -> None:
        """Hand over a layer if the writer wants it.

        Args:
            records: makes the records, uint8 [experts, record_bytes]; called only where they are wanted.
        """
        while self._writer.is_alive():
            try:
                asked = self._asked.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if asked != layer:
                raise RuntimeError(f"the expert file wants layer {asked}, and vLLM loads layer {layer}")
            self._given.put(records())
            return
        if self._error is not None:  # such as a full disk, before the other layers are repacked
            raise self._error

    def abandon(self, error: BaseException) -> None:
        """No more layers come: let the writer give up, and remove what it wrote."""
        self._given.put(error)
        self._writer.join(ABANDON_S)

    def finish(self) -> None:
        """All layers are there: wait for the disk, and get ready to read.

        Raises:
            StorageError: the file cannot be written or read.
        """
        self._writer.join()
        if self._error is not None:
            raise self._error
        assert self._file is not None
        self.written = self._file.written
        if self.device.type == "cuda":
            _ = self.mailbox  # its faults belong to loading

    @cached_property
    def mailbox(self) -> "FileMailbox":
        """Through which the device's kernels ask for records."""
        from evalsuite.engines.vllm_plugin.copies import FileMailbox
        from evalsuite.engines.vllm_plugin.file_readers import FileReaders

        assert self._file is not None
        first = self.header.offset(0, 0)
        readers = FileReaders(
            self._file.descriptor, self._file.path, first, self.header.record_bytes, self.device,
            self._sharers,
        )  # fmt: skip
        self._closing.callback(readers.stop)  # before the file is closed
        return FileMailbox(readers, self.device)

    @cached_property
    def _staging(self) -> Staging:
        opened = self._file
        assert opened is not None

        def read(offset: int, out: memoryview) -> None:
            read_records(opened.descriptor, offset, out, opened.path)

        return Staging(self.device, self.layout.record_bytes, read)

    @cached_property
    def _scratch(self) -> Tensor:
        return torch.empty(SCRATCH, self.layout.record_bytes, dtype=torch.uint8, device=self.device)

    @cached_property
    def _views(self) -> dict[str, Tensor]:
        return self.layout.views(self._scratch)

    def fetch(self, row: int, loads: Sequence[tuple[int, int]], slots: Mapping[str, Tensor]) -> None:
        """Copy experts of the layer at `row` of the header into slots."""
        for start in range(0, len(loads), SCRATCH):
            some = loads[start : start + SCRATCH]
            self._staging.copy(
                [(self.header.offset(row, e), self._scratch[i]) for i, (e, _) in enumerate(some)]
            )
            for tensor, view in zip(slots.values(), self._views.values(), strict=True):
                for i, (_, slot) in enumerate(some):
                    tensor[slot].copy_(view[i])


class DiskExperts:
    """One layer of an `ExpertFile`; used like `HostExperts`."""

    def __init__(self, file: ExpertFile, layer: int, names: Sequence[str]) -> None:
        self._file, self.names = file, tuple(names)
        self._row = file.header.layers.index(layer)
        self.experts = file.header.experts
        self.expert_bytes = sum(field.bytes for field in file.layout.fields)

    @property
    def written(self) -> bool:
        """Whether this process wrote the file; else it was there."""
        return self._file.written

    def fetch(self, loads: Sequence[tuple[int, int]], slots: Mapping[str, Tensor]) -> None:
        self._file.fetch(self._row, loads, slots)

    def copies(self, device: torch.device) -> "Copies":
        assert device == self._file.device
        return _FileCopies(self._file, self._row)


class _FileCopies:
    """One layer's records for kernels; the file may still be written while the first layers are made."""

    def __init__(self, file: ExpertFile, row: int) -> None:
        self._file = file
        self._first = row * file.header.experts
        self._starts = tuple(start // 4 for start in file.layout.offsets[:-1])

    def launch(self, loads: "Loads", slots: tuple[Tensor, ...], most: int) -> None:
        self._file.mailbox.launch(self._first, self._starts, loads, slots, most)

    def check(self) -> None:
        self._file.mailbox.readers.raise_fault()


def open_file(
    config: Any, backend: str, layers: tuple[int, ...], experts: int, shapes: Shapes, device: torch.device
) -> ExpertFile:
    """Begin to open or write the file of an engine.

    Args:
        config: vLLM's configuration.
        backend: of vLLM's experts, which orders their weights in a way of its own.
        layers: numbers of all layers with experts in this process.
        shapes: part of an expert to shape and dtype.
    """
    parallel = config.parallel_config
    rank = f"tp{parallel.rank}of{parallel.tensor_parallel_size}"
    made_for = f"vllm-{version('vllm')}-{device.type}-{backend}-{rank}"
    layout = RecordLayout(
        tuple(
            Field(f"{name}@{made_for}", str(dtype).removeprefix("torch."), shape)
            for name, (shape, dtype) in shapes.items()
        )
    )
    dummy = config.load_config.load_format == "dummy"
    checkpoint = _checkpoint(config, weights=not dummy)
    fingerprint = checkpoint.fingerprint()
    if dummy:
        fingerprint = hashlib.sha256(f"dummy {fingerprint}".encode()).hexdigest()
    header = Header(
        fingerprint,
        f"{checkpoint.name}, random weights" if dummy else checkpoint.name,
        str(checkpoint.folder),
        layers,
        experts,
        layout.record_bytes,
        tuple((f.name, f.dtype, f.shape) for f in layout.fields),
    )
    return ExpertFile(header, layout, device, sharers=parallel.world_size)


def _checkpoint(config: Any, *, weights: bool) -> Checkpoint:
    """What vLLM loads: a folder, or the revision of a hub id that it was asked for, where it was put."""
    model = config.model_config.model
    if Path(model).is_dir():
        return Checkpoint(Path(model).name, Path(model), weights=weights)
    return find_checkpoint(
        model, weights, revision=config.model_config.revision, cache=config.load_config.download_dir
    )
