"""What computes: the device and the type that ``auto`` stands for, and the failure of either's memory."""

import contextlib
from collections.abc import Iterator

import torch

from evalsuite.core.errors import ModelError, OutOfMemory

CPU_OUT_OF_MEMORY = "DefaultCPUAllocator"


def resolve_compute(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Device and type for ``auto``: CUDA if there is any, bfloat16 where the device computes in it.

    Raises:
        ModelError: the device does not exist.
    """
    if device == "auto":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"There is no GPU {place.index}: torch can use {torch.cuda.device_count()} on this machine.",
            todo="choose another with --gpus, or leave it out; `hlwq-eval doctor` lists them.",
        )
    if dtype != "auto":
        return place, getattr(torch, dtype)
    return place, torch.bfloat16 if _computes_bfloat16(place) else torch.float32


def _computes_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


@contextlib.contextmanager
def out_of_memory(what: str) -> Iterator[None]:
    """Both allocators' failures as one error.

    Raises:
        OutOfMemory: the device or the CPU could not allocate.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"{what} does not fit on the GPU.", cause=str(error).splitlines()[0]) from error
    except MemoryError as error:
        raise OutOfMemory(f"{what} does not fit in memory.") from error
    except RuntimeError as error:
        if CPU_OUT_OF_MEMORY not in str(error):
            raise
        raise OutOfMemory(f"{what} does not fit in memory.", cause=str(error).splitlines()[0]) from error
