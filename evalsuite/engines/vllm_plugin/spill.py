"""Memory for what does not fit into memory while vLLM loads: files that the kernel writes to when it must."""

from collections.abc import Iterable
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from torch.nn import Parameter

from evalsuite.core.errors import StorageError
from evalsuite.core.units import si_bytes
from evalsuite.experts.files import reserve

SMALLEST_BYTES = 1 << 20  # less stays in memory


def spill(parameters: Iterable[Parameter], folder: Path, wanted_bytes: int) -> None:
    """Put parameters on the CPU into files of `folder`, which are gone as soon as nothing uses them.

    What they held is not kept.

    Args:
        wanted_bytes: of all layers, for the message.

    Raises:
        StorageError: the disk has no room for them.
    """
    for parameter in parameters:
        if parameter.nbytes < SMALLEST_BYTES:
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile(dir=folder, prefix="loading-") as file:
                reserve(file.fileno(), folder, parameter.nbytes)  # a full disk would be a SIGBUS later
                flat = torch.from_file(
                    file.name, shared=True, size=parameter.numel(), dtype=parameter.dtype, device="cpu"
                )
        except OSError as error:
            raise StorageError(
                f"The experts do not fit in the memory that is free, and {folder} cannot take them while "
                f"they load: {si_bytes(wanted_bytes)}, beside as much for their file.",
                cause=error.strerror or str(error),
                todo="make room (`hlwq-eval cache gc`), choose another folder with HLWQ_EVAL_CACHE, or use a "
                "machine with more memory.",
            ) from error
        parameter.data = flat.view(parameter.shape)
