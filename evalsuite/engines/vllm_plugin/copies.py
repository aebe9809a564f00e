"""How the experts that `kernels.place` found missing come to the device: from memory, or from a file."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from evalsuite.engines.vllm_plugin import kernels
from evalsuite.engines.vllm_plugin.file_readers import MARK_WORDS, PIECE_BYTES, ROOM, FileReaders

WORDS = 4096  # 16 KiB for each program at once
PROGRAMS_PER_PROCESSOR = 2
FILE_PROGRAMS = 128  # a program for each piece of eight experts; more would only wait


@dataclass(frozen=True)
class Loads:
    """What `place` wants copied, int32 on the device: how many, which experts, into which slots."""

    count: Tensor
    expert: Tensor
    slot: Tensor


class Copies(Protocol):
    """The experts of one layer, for kernels."""

    def launch(self, loads: Loads, slots: tuple[Tensor, ...], most: int) -> None:
        """Queue the copies of a group.

        Args:
            slots: the parts of an expert, int32 [slots, words].
            most: loads that there can be.
        """
        ...

    def check(self) -> None:
        """Look whether what was copied came; does not wait for the device.

        Raises:
            StorageError: some did not.
        """
        ...


class PinnedCopies:
    """From page-locked host memory, which the kernel reads itself.

    Args:
        parts: part to a tensor of all experts.
    """

    def __init__(self, parts: Mapping[str, Tensor], device: torch.device) -> None:
        self._words = tuple(t[0].nbytes // 4 for t in parts.values())
        self._source = tuple(as_words(mapped(t, device)) for t in parts.values())
        self._programs = 4
        if device.type == "cuda":
            processors = torch.cuda.get_device_properties(device).multi_processor_count
            self._programs = PROGRAMS_PER_PROCESSOR * processors

    def launch(self, loads: Loads, slots: tuple[Tensor, ...], most: int) -> None:
        del most  # the kernel takes any number
        fetch: Any = kernels.fetch
        fetch[(self._programs,)](
            loads.count, loads.expert, loads.slot, self._source, slots,
            row_words=self._words, words=WORDS, programs=self._programs, num_warps=8,
        )  # fmt: skip

    def check(self) -> None:
        pass


class FileMailbox:
    """A file's readers as the kernels of one device see them; one for all layers, whose steps take turns."""

    def __init__(self, readers: FileReaders, device: torch.device) -> None:
        self.readers = readers
        self.mailbox, self.marks = mapped(readers.mailbox, device), mapped(readers.marks, device)
        self.buffers = mapped(readers.buffers, device).view(torch.int32)
        self.number = torch.zeros(1, dtype=torch.int32, device=device)  # of the last request
        self.programs = FILE_PROGRAMS if device.type == "cuda" else 4

    def launch(
        self, row: int, starts: tuple[int, ...], loads: Loads, slots: tuple[Tensor, ...], most: int
    ) -> None:
        """Queue the copies of a group.

        Args:
            row: the layer's first record in the file.
            starts: where each part begins in a record, in words.
        """
        request: Any = kernels.request
        take: Any = kernels.take
        for first in range(0, most, ROOM):
            request[(1,)](
                loads.count, loads.expert, first, row, self.number, self.mailbox, ROOM=ROOM, num_warps=1
            )
            take[(self.programs,)](
                loads.count, loads.slot, first, self.number, self.marks, self.buffers, slots,
                starts=starts, row_words=tuple(t.shape[1] for t in slots), ROOM=ROOM,
                record_words=self.buffers.shape[1], piece_words=PIECE_BYTES // 4, mark_words=MARK_WORDS,
                words=WORDS, programs=self.programs, LANES=256, num_warps=8,
            )  # fmt: skip


def as_words(tensor: Tensor) -> Tensor:
    return tensor.view(len(tensor), -1).view(torch.int32)


def mapped(tensor: Tensor, device: torch.device) -> Tensor:
    """The same memory as the device sees it."""
    if device.type == "cpu":
        return tensor
    from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor

    return get_accelerator_view_from_cpu_tensor(tensor)
