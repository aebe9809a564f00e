"""Threads that read an expert file as kernels ask for it, so that a step needs no word from Python.

The GPU and the threads talk through page-locked memory. A kernel writes a request, numbered: which records,
into which buffers. Each thread spins on it, reads its share of the pieces with ``pread`` and marks every
piece with the request's number; the copying kernel waits for the mark of a piece and takes the piece. Every
word of a request carries its number, so none needs to arrive before another, and the next request cannot
come before the kernel has taken all of this one. CUDA graphs hold both kernels.

The threads are compiled and hold no GIL. One that cannot read marks its pieces all the same, for a kernel
that waits for ever would hang the GPU, and the worker finds the fault after the step. The host must be an
x86: its stores, a piece and then its mark, are seen in that order.
"""

# pyright: reportIndexIssue=false

import ctypes
import os
import platform
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from evalsuite.core.errors import OutOfMemory, StorageError, UsageError
from evalsuite.core.units import si_bytes
from evalsuite.experts.files import read_records

ROOM = 16  # records of one request
PIECE_BYTES = 1 << 17
MARK_WORDS = 16  # a cache line for each mark
READERS = 16
SPINS = 4000  # about a millisecond without a request, after which a thread sleeps between looks
NAPS = 20_000  # about a second of them, after which it sleeps longer
NAP_US, LONG_NAP_US = 50, 1000
TRIES = 3  # at a read that fails; a signal may have interrupted it
LOW = (1 << 32) - 1
STOP, FAULT = 0, 1  # words of the control block; a fault is the offset that cannot be read

_libc = ctypes.CDLL(None)
_pread: Any = _libc.pread
_pread.argtypes = (ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int64)
_pread.restype = ctypes.c_ssize_t
_yield: Any = _libc.sched_yield
_yield.argtypes, _yield.restype = (), ctypes.c_int
_nap: Any = _libc.usleep
_nap.argtypes, _nap.restype = (ctypes.c_uint,), ctypes.c_int


@njit(nogil=True)
def _serve(
    mailbox: Any, control: Any, marks: Any, buffers: int, record_bytes: int, file: int, start: int,
    reader: int, readers: int,
) -> None:  # fmt: skip
    """Read every `readers`-th piece of each request until told to stop.

    Args:
        mailbox: int64 [1 + ROOM]: the request's number in the upper half of each word; in the lower one the
            count of records, then their places in the file.
        control: int64 [2].  marks: int32 [ROOM · pieces · MARK_WORDS].
        buffers: address of the first.  start: of the first record in the file.
    """
    pieces = -(-record_bytes // PIECE_BYTES)
    served = 0
    looks = 0
    while control[STOP] == 0:
        request = mailbox[0]
        number = request >> 32
        if number == served:  # the calls keep the compiler from reading the mailbox only once
            looks += 1
            if looks < SPINS:
                _yield()
            else:
                _nap(NAP_US if looks < SPINS + NAPS else LONG_NAP_US)
            continue
        looks = 0
        for piece in range(reader, (request & LOW) * pieces, readers):
            load = piece // pieces
            record = mailbox[1 + load]
            while record >> 32 != number and control[STOP] == 0:
                _yield()
                record = mailbox[1 + load]
            begin = (piece % pieces) * PIECE_BYTES
            left = min(PIECE_BYTES, record_bytes - begin)
            place = start + (record & LOW) * record_bytes + begin
            target = buffers + load * record_bytes + begin
            tries = 0
            while left > 0:
                count = _pread(file, target, left, place)
                if count > 0:
                    left, place, target = left - count, place + count, target + count
                    continue
                tries += 1
                if tries == TRIES:
                    control[FAULT] = place
                    break
            marks[piece * MARK_WORDS] = number
        served = number


class FileReaders:
    """Readers of one file, and the memory through which kernels reach them.

    Args:
        descriptor: of the open file; stays open.
        start: where the first record begins, in bytes.
        device: whose kernels ask.
        sharers: processes on this machine that read at the same time, such as the ranks of a tensor-parallel
            group; they share its cores.
        readers: how many threads; half of this process's cores by default, and 16 at most.

    Attributes:
        mailbox, marks, buffers: as in `_serve`, on the host.

    Raises:
        OutOfMemory: the buffers cannot be pinned.
        UsageError: the host is no x86.
    """

    def __init__(
        self, descriptor: int, path: Path, start: int, record_bytes: int, device: torch.device,
        sharers: int = 1, readers: int | None = None,
    ) -> None:  # fmt: skip
        self._descriptor, self._path = descriptor, path
        pinned = device.type == "cuda"
        if pinned and platform.machine() not in ("x86_64", "AMD64"):
            raise UsageError(
                f"The expert file cannot be read for a GPU on {platform.machine()}.",
                cause="its readers rely on the order in which an x86 stores.",
                todo="keep the experts in memory with --moe-expert-store pinned.",
            )
        pieces = -(-record_bytes // PIECE_BYTES)
        try:
            with torch.device("cpu"):
                self.mailbox = torch.zeros(1 + ROOM, dtype=torch.int64, pin_memory=pinned)
                self.marks = torch.zeros(ROOM * pieces * MARK_WORDS, dtype=torch.int32, pin_memory=pinned)
                self.buffers = torch.zeros(ROOM, record_bytes, dtype=torch.uint8, pin_memory=pinned)
        except RuntimeError as error:
            raise OutOfMemory(
                f"{si_bytes(ROOM * record_bytes)} of host memory, through which experts come from the disk, "
                "cannot be pinned.",
                cause=str(error).partition("\n")[0],
                todo="raise the limit of locked memory (ulimit -l), or free some memory.",
            ) from error
        self._control = np.zeros(2, np.int64)
        readers = readers or max(1, min(READERS, len(os.sched_getaffinity(0)) // (2 * sharers)))
        stopped = np.array([1, 0], np.int64)
        _serve(  # compiles it here, where an error is raised
            self.mailbox.numpy(), stopped, self.marks.numpy(), 0, record_bytes, descriptor, start, 0, readers
        )
        threads = [
            threading.Thread(
                target=_serve,
                args=(
                    self.mailbox.numpy(), self._control, self.marks.numpy(), self.buffers.data_ptr(),
                    record_bytes, descriptor, start, reader, readers,
                ),
                name=f"expert reader {reader}",
                daemon=True,
            )
            for reader in range(readers)
        ]  # fmt: skip
        for thread in threads:
            thread.start()
        keep: tuple[Tensor, ...] = (self.mailbox, self.marks, self.buffers)  # until no thread touches them
        self._stop = weakref.finalize(self, _stop, self._control, threads, keep, device)

    def raise_fault(self) -> None:
        """Tell of what could not be read since the start.

        Raises:
            StorageError: something; what the GPU has computed since is worthless.
        """
        if place := int(self._control[FAULT]):
            read_records(self._descriptor, place, memoryview(bytearray(1)), self._path)
            raise StorageError(
                f"{self._path} could not be read for a while, and now it can.",
                cause="the disk or the network before it failed for a moment.",
                todo="run the same command again, or keep the experts with --moe-expert-store pinned.",
            )

    def stop(self) -> None:
        """Wait for the kernels that have asked, and end the threads."""
        self._stop()


def _stop(
    control: Any, threads: list[threading.Thread], keep: tuple[Tensor, ...], device: torch.device
) -> None:
    if device.type == "cuda":
        with suppress(RuntimeError):  # a device that failed has no kernels left
            torch.cuda.synchronize(device)
    control[STOP] = 1
    for thread in threads:
        thread.join()
    del keep
