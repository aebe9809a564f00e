"""Memory for what does not fit into memory while vLLM loads: files that the kernel writes to when it must."""

import os
from collections.abc import Iterable
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from torch.nn import Parameter

from evalsuite.experts.files import room_for_experts

SMALLEST_BYTES = 1 << 20  # less stays in memory


def spill(parameters: Iterable[Parameter], folder: Path) -> None:
    """Put parameters on the CPU into files of `folder`, which are gone as soon as nothing uses them.

    What they held is not kept.

    Raises:
        StorageError: the disk has no room for them.
    """
    for parameter in parameters:
        if parameter.nbytes < SMALLEST_BYTES:
            continue
        with room_for_experts(folder / "loading", parameter.nbytes):
            folder.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile(dir=folder, prefix="loading-") as file:
                os.posix_fallocate(file.fileno(), 0, parameter.nbytes)  # a full disk would be a SIGBUS later
                flat = torch.from_file(
                    file.name, shared=True, size=parameter.numel(), dtype=parameter.dtype, device="cpu"
                )
        parameter.data = flat.view(parameter.shape)
