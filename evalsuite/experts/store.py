"""Where the experts are that are not on the device: every record of a checkpoint, ready to be copied.

- `PinnedStore`: all of them in memory, page-locked where a GPU copies from it.
- `DiskStore`: all of them in one file (experts/files.py), none of it pinned and none of it in this process:
  the system's page cache keeps the pages that are read often, and gives them up when memory is short. The
  file is read with ``preadv`` rather than mapped: one call an expert instead of a page fault each 4 to 64
  KiB, and a file that is cut short under a running engine is an error instead of a SIGBUS. Several threads
  read into a small page-locked ring, from which the device copies.
"""

import mmap
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from evalsuite.core.errors import OutOfMemory
from evalsuite.core.units import si_bytes
from evalsuite.experts.files import cache_folder, open_or_write, read_records
from evalsuite.experts.header import Header
from evalsuite.experts.layout import RecordLayout
from evalsuite.experts.memory import free_ram_bytes

STAGING_THREADS = 8
BUFFERS_A_THREAD = 2
SMALLEST_PIECE = 1 << 18  # bytes; smaller reads cost more in switching threads than they gain


class ExpertSource(Protocol):
    """The experts of a checkpoint, a layer at a time."""

    @property
    def layout(self) -> RecordLayout: ...

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have experts."""
        ...

    @property
    def experts(self) -> int:
        """In each layer."""
        ...

    def read_layer(self, layer: int, out: Tensor) -> None:
        """Write all records of a layer into `out`, uint8 [experts, record_bytes]."""
        ...


@dataclass(frozen=True)
class Identity:
    """Whose experts these are: the checkpoint's hash and name, and the folder that it lies in."""

    fingerprint: str
    checkpoint: str
    source: str


class ExpertStore(ABC):
    """All experts of a checkpoint outside the device.

    Attributes:
        kind: its name on the command line.
        notes: what a reader of the run should know about it.
    """

    kind: str
    notes: tuple[str, ...] = ()

    def __init__(self, layout: RecordLayout, layers: tuple[int, ...], experts: int) -> None:
        self.layout, self.layers, self.experts = layout, layers, experts

    @abstractmethod
    def fill(self, layer: int, loads: Sequence[tuple[int, int]], slots: Sequence[Tensor]) -> None:
        """Copy experts into slots; on a GPU, queue the copies on the current stream.

        Args:
            loads: (expert, slot) of each copy.
            slots: a tensor each, uint8 [record_bytes].

        Raises:
            StorageError: they cannot be read.
        """

    @abstractmethod
    def close(self) -> None:
        """Give memory and files back; no copy may be under way."""


class PinnedStore(ExpertStore):
    """In memory; for a GPU, page-locked, so that copies run at the full rate and beside computation."""

    kind = "pinned"

    def __init__(self, source: ExpertSource, device: torch.device) -> None:
        """Read all experts.

        Raises:
            OutOfMemory: they do not fit in memory, or cannot be page-locked.
        """
        super().__init__(source.layout, source.layers, source.experts)
        shape = (len(source.layers), source.experts, source.layout.record_bytes)
        needed = shape[0] * shape[1] * shape[2]
        available = free_ram_bytes()
        if needed > available:
            raise OutOfMemory(
                f"The experts need {si_bytes(needed)} of memory, and {si_bytes(available)} are free.",
                todo="give --moe-expert-store disk.",
            )
        # torch's own pinned allocator rounds up to powers of two
        memory = mmap.mmap(-1, needed, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._records: Tensor | None = torch.frombuffer(memory, dtype=torch.uint8).view(shape)
        # a tensor an expert, since making one takes as long as queueing its copy
        self._row = {layer: self._records[i].unbind() for i, layer in enumerate(source.layers)}
        for i, layer in enumerate(source.layers):
            source.read_layer(layer, self._records[i])
        self._locked = device.type == "cuda"
        if self._locked:
            _page_lock(self._records)

    def fill(self, layer: int, loads: Sequence[tuple[int, int]], slots: Sequence[Tensor]) -> None:
        records = self._row[layer]
        for expert, slot in loads:
            slots[slot].copy_(records[expert], non_blocking=True)

    def close(self) -> None:
        if self._records is not None and self._locked:
            cuda_runtime().cudaHostUnregister(self._records.data_ptr())
        self._records = None
        self._row.clear()


def cuda_runtime() -> Any:
    return torch.cuda.cudart()


def _page_lock(records: Tensor) -> None:
    """Raises OutOfMemory: the driver refuses."""
    code = int(cuda_runtime().cudaHostRegister(records.data_ptr(), records.nbytes, 0))
    if code != 0:
        raise OutOfMemory(
            f"{si_bytes(records.nbytes)} of memory could not be page-locked.",
            cause=f"the driver answered with error {code}; containers often limit locked memory.",
            todo="raise the limit (ulimit -l), or give --moe-expert-store disk.",
        )


def memory_of(records: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    array: Any = records.numpy()
    return memoryview(array).cast("B")


class DiskStore(ExpertStore):
    """In one file, shared read-only by every process that runs this checkpoint."""

    kind = "disk"

    def __init__(
        self, source: ExpertSource, identity: Identity, device: torch.device, folder: Path | None = None
    ) -> None:
        """Open the file, writing it first where it is missing or damaged.

        Args:
            folder: of the files; `cache_folder()` by default.

        Raises:
            StorageError: the disk has no room, or cannot be written or read.
        """
        super().__init__(source.layout, source.layers, source.experts)
        header = Header(
            identity.fingerprint,
            identity.checkpoint,
            identity.source,
            source.layers,
            source.experts,
            source.layout.record_bytes,
            tuple((f.name, f.dtype, f.shape) for f in source.layout.fields),
        )
        records: list[Tensor] = []  # of one layer, reused; none at all where the file exists

        def read_layer(layer: int) -> memoryview:
            if not records:
                records.append(torch.zeros(source.experts, header.record_bytes, dtype=torch.uint8))
            source.read_layer(layer, records[0])
            return memory_of(records[0])

        self._file = open_or_write(header, cache_folder() if folder is None else folder, read_layer)
        self.path, self.written, self.notes = self._file.path, self._file.written, self._file.notes
        self._row = {layer: row for row, layer in enumerate(source.layers)}
        self._staging = Staging(device, header.record_bytes, self._read)

    def _read(self, offset: int, out: memoryview) -> None:
        read_records(self._file.descriptor, offset, out, self._file.path)

    def fill(self, layer: int, loads: Sequence[tuple[int, int]], slots: Sequence[Tensor]) -> None:
        row, header = self._row[layer], self._file.header
        self._staging.copy([(header.offset(row, expert), slots[slot]) for expert, slot in loads])

    def close(self) -> None:
        self._staging.close()
        os.close(self._file.descriptor)


class Staging:
    """From a file to the device through a ring of buffers that several threads fill.

    Args:
        read: fills memory from an offset of the file; called from the threads.
    """

    def __init__(
        self,
        device: torch.device,
        record_bytes: int,
        read: Callable[[int, memoryview], None],
        threads: int | None = None,
    ) -> None:
        self._threads = threads or min(STAGING_THREADS, len(os.sched_getaffinity(0)))
        count = BUFFERS_A_THREAD * self._threads
        on_gpu = device.type == "cuda"
        self._buffers = torch.empty(count, record_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        self._memory = [memory_of(buffer) for buffer in self._buffers]
        self._copied = [torch.cuda.Event() for _ in range(count)] if on_gpu else None
        self._read = read
        self._next = 0
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="experts")

    def copy(self, jobs: Sequence[tuple[int, Tensor]]) -> None:
        """Copy one record to each target.

        Args:
            jobs: offset in the file and target, uint8 [record_bytes].
        """
        pieces = max(1, self._threads // max(1, len(jobs)))
        under_way: deque[tuple[int, Tensor, list[Future[None]]]] = deque()
        try:
            for offset, target in jobs:
                if len(under_way) == len(self._memory):
                    self._send(*under_way.popleft())
                buffer, self._next = self._next, (self._next + 1) % len(self._memory)
                under_way.append((buffer, target, self._start(buffer, offset, pieces)))
            while under_way:
                self._send(*under_way.popleft())
        finally:  # after an error: no thread may write to a buffer that the next step uses
            wait([future for _, _, futures in under_way for future in futures])

    def _start(self, buffer: int, offset: int, pieces: int) -> list[Future[None]]:
        memory = self._memory[buffer]
        size = max(SMALLEST_PIECE, -(-len(memory) // pieces))
        return [
            self._pool.submit(self._fill, buffer, offset + start, memory[start : start + size])
            for start in range(0, len(memory), size)
        ]

    def _fill(self, buffer: int, offset: int, memory: memoryview) -> None:
        if self._copied is not None:
            self._copied[buffer].synchronize()  # the device may still copy what was here
        self._read(offset, memory)

    def _send(self, buffer: int, target: Tensor, futures: list[Future[None]]) -> None:
        try:
            for future in futures:
                future.result()
        finally:
            wait(futures)
        target.copy_(self._buffers[buffer], non_blocking=True)
        if self._copied is not None:
            self._copied[buffer].record()

    def close(self) -> None:
        self._pool.shutdown()
