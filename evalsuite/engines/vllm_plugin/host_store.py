"""The experts of one layer in host memory, as vLLM's kernels want them, pinned for the GPU."""

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evalsuite.core.errors import OutOfMemory
from evalsuite.core.units import si_bytes
from evalsuite.experts.memory import free_ram_bytes

if TYPE_CHECKING:
    from evalsuite.engines.vllm_plugin.copies import Copies

SPARE_BYTES = 1 << 30


class HostExperts:
    """One tensor for each part of an expert (packed weights, scales), experts along the first dimension.

    Args:
        shapes: part to the shape of one expert's tensor, and its dtype.
        experts: how many experts there are.
        pin: lock the pages and let the GPU address them.

    Raises:
        OutOfMemory: the layer does not fit into the memory that is free.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], experts: int, pin: bool
    ) -> None:
        self.experts, self.names = experts, tuple(shapes)
        self.expert_bytes = sum(
            torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes.values()
        )
        require_room(self.expert_bytes * experts, "one layer's experts")
        with torch.device("cpu"):
            self.parts: dict[str, Tensor] = {
                name: torch.empty((experts, *shape), dtype=dtype) for name, (shape, dtype) in shapes.items()
            }
        if pin:
            for tensor in self.parts.values():
                _lock_pages(tensor)
                weakref.finalize(self, _cudart().cudaHostUnregister, tensor.data_ptr())

    def fetch(self, loads: Sequence[tuple[int, int]], slots: Mapping[str, Tensor]) -> None:
        """Copy experts into slots.

        Args:
            loads: (expert, slot) of each copy.
        """
        for expert, slot in loads:
            for name, tensor in self.parts.items():
                slots[name][slot].copy_(tensor[expert])

    def copies(self, device: torch.device) -> "Copies":
        """The same experts for kernels of a device."""
        from evalsuite.engines.vllm_plugin.copies import PinnedCopies

        return PinnedCopies(self.parts, device)


def has_room(wanted_bytes: int) -> bool:
    """Whether so many bytes of host memory, and 1 GiB, are free."""
    return wanted_bytes + SPARE_BYTES <= free_ram_bytes()


def require_room(wanted_bytes: int, what: str) -> None:
    """Refuse what would take the machine's last memory.

    Raises:
        OutOfMemory: it has no room.
    """
    if not has_room(wanted_bytes):
        free = free_ram_bytes()
        raise OutOfMemory(
            f"The expert cache has to keep {what} in host memory: {si_bytes(wanted_bytes)}.",
            cause=f"{si_bytes(free)} are free, of which {si_bytes(SPARE_BYTES)} are left alone.",
            todo="use a machine with more memory, or --moe-expert-store disk.",
        )


def _cudart() -> Any:
    return torch.cuda.cudart()


def _lock_pages(tensor: Tensor) -> None:
    """Pin exactly this tensor: torch's own pinned memory is rounded up to powers of two."""
    code = _cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
    if int(code) != 0:
        raise OutOfMemory(
            f"{si_bytes(tensor.nbytes)} of host memory cannot be pinned (CUDA error {int(code)}).",
            cause="locked memory may be limited here: see ulimit -l.",
            todo="raise the limit, or use --moe-expert-store disk, which pins little.",
        )
