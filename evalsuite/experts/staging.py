"""From a file to the device: several threads read into page-locked buffers, from which the device copies.

A step waits for its experts, so what counts is how soon the threads begin, not only how fast they read: they
are numba's, which spin between two reads, where a pool of Python threads would be woken one after another
through the interpreter's lock. The buffers have two halves, of which one is read into while the device still
copies from the other. Reads are ``pread``, not a mapping: one call a piece instead of a page fault each 4 to
64 KiB, and a file that is cut short under a running engine is an error instead of a SIGBUS.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from evalsuite.experts.files import read_records
from evalsuite.experts.layout import memory_of

THREADS = 8
HALF = 4  # records in half of the buffers
PIECE = 1 << 18  # bytes; smaller ones cost more in calls than they gain in sharing

# the address is an integer here: numba knows no other way to hand one over
_pread: Any = ctypes.CDLL(None).pread
_pread.argtypes = (ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int64)
_pread.restype = ctypes.c_int64
_jit: Any = numba.njit(parallel=True, nogil=True)


@_jit
def _read_all(descriptor: int, addresses: Any, sizes: Any, offsets: Any, counts: Any) -> None:
    for i in numba.prange(len(addresses)):
        counts[i] = _pread(descriptor, addresses[i], sizes[i], offsets[i])


class Staging:
    """Two halves of a page-locked buffer between one file and one device.

    Args:
        record_bytes: what is copied at a time.
        descriptor, path: of the file, open for reading; it stays the caller's to close.
    """

    def __init__(self, device: torch.device, record_bytes: int, descriptor: int, path: Path) -> None:
        on_gpu = device.type == "cuda"
        self._descriptor, self._path = descriptor, path
        self._threads = min(THREADS, numba.config.NUMBA_NUM_THREADS)  # pyright: ignore[reportAttributeAccessIssue]
        self._buffers = torch.empty(2, HALF, record_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        self._copied = [torch.cuda.Event() for _ in range(2)] if on_gpu else None
        self._half = 0
        starts = np.arange(0, record_bytes, PIECE)
        self._starts, self._sizes = starts, np.minimum(PIECE, record_bytes - starts)
        self._read(self._buffers[0], [])  # compiles

    def copy(self, jobs: Sequence[tuple[int, Tensor]]) -> None:
        """Copy one record to each target.

        Args:
            jobs: offset in the file and target, uint8 [record_bytes].

        Raises:
            StorageError: the file was cut short, or the disk fails.
        """
        for start in range(0, len(jobs), HALF):
            some = jobs[start : start + HALF]
            half = self._half = 1 - self._half
            buffers = self._buffers[half]
            if self._copied is not None:
                self._copied[half].synchronize()  # the device may still copy what was here
            self._read(buffers, [offset for offset, _ in some])
            for buffer, (_, target) in zip(buffers, some, strict=False):
                target.copy_(buffer, non_blocking=True)
            if self._copied is not None:
                self._copied[half].record()

    def _read(self, buffers: Tensor, offsets: Sequence[int]) -> None:
        """Fill the first buffers, one from each offset of the file."""
        bases = buffers.data_ptr() + buffers.stride(0) * np.arange(len(offsets))
        addresses = (bases[:, None] + self._starts).ravel()
        places = (np.asarray(offsets, np.int64)[:, None] + self._starts).ravel()
        sizes = np.tile(self._sizes, len(offsets))
        counts = np.zeros(len(sizes), np.int64)
        numba.set_num_threads(self._threads)
        _read_all(self._descriptor, addresses, sizes, places, counts)
        for piece in np.flatnonzero(counts != sizes):  # once more, by a call that says what is wrong
            record, part = divmod(int(piece), len(self._starts))
            start = int(self._starts[part])
            memory = memory_of(buffers[record])[start : start + int(self._sizes[part])]
            read_records(self._descriptor, int(places[piece]), memory, self._path)
