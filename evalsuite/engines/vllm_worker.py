"""What vLLM's workers are asked for, by remote call into whatever process they run in.

vLLM adds this class to its own worker class (``worker_extension_cls``), so nothing has to be pickled and the
same calls work in one process, in several, and on several GPUs. An answer holds only plain values.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Any

import torch

from evalsuite.engines import vllm_cpu_heads, vllm_zipf
from evalsuite.engines.vllm_arguments import ROUTING_VARIABLE
from evalsuite.engines.vllm_hidden import HiddenScoring

# this module is imported in each of vLLM's workers, before a model runs
vllm_cpu_heads.install()
vllm_zipf.install(os.environ.get(ROUTING_VARIABLE, ""))


class WorkerExtension(HiddenScoring):
    """Methods of a vLLM worker; `device` is the worker's own."""

    device: Any

    def hlwq_facts(self) -> dict[str, Any]:
        """What was loaded: sizes in bytes, captured graphs, and the names of the kernels in use."""
        from vllm.compilation.counter import compilation_counter

        model = self.model_runner.model
        return {
            # as vLLM measured it while loading; its CPU runner does not, and hides packed weights
            "weights_bytes": getattr(self.model_runner, "model_memory_usage", None),
            "kv_cache_bytes": _storage_bytes(_tensors(self.model_runner.kv_caches)),
            "graphs_captured": compilation_counter.num_cudagraph_captured,
            "kernels": _kernels(model),
            "attention": _attention(model),
            "device_name": _device_name(self.device),
        }

    def hlwq_allocator_peaks(self) -> dict[str, int] | None:
        """Peaks of torch's allocator since the last reset, in bytes; None where the device is the CPU."""
        if self.device.type != "cuda":
            return None
        return {
            "allocated": torch.cuda.max_memory_allocated(self.device),
            "reserved": torch.cuda.max_memory_reserved(self.device),
        }

    def hlwq_reset_peaks(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)


def _device_name(device: Any) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Caches are tensors for attention, and tuples of tensors for recurrent layers."""
    if isinstance(value, torch.Tensor):
        yield value
    else:
        for part in value:
            yield from _tensors(part)


def _storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _kernels(model: torch.nn.Module) -> dict[str, int]:
    """Quantization methods, kernels and expert backends by name, with the number of layers that use them."""
    found: Counter[str] = Counter()
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if method is None:
            continue
        scheme = getattr(layer, "scheme", None)
        kernel = getattr(scheme, "kernel", None) or getattr(method, "kernel", None)
        backend = getattr(method, "wna16_moe_backend", None) or getattr(method, "unquantized_backend", None)
        parts = [type(part).__name__ for part in (scheme or method, kernel) if part is not None]
        found["/".join([*parts, *([str(backend.value)] if backend is not None else [])])] += 1
    return dict(found)


def _attention(model: torch.nn.Module) -> dict[str, int]:
    """Names of the backends in use; an encoder's layers hold a member of vLLM's enumeration."""
    backends = (getattr(layer, "attn_backend", None) for layer in model.modules())
    return dict(
        Counter(
            backend.name if isinstance(backend, Enum) else backend.get_name()
            for backend in backends
            if backend is not None
        )
    )
