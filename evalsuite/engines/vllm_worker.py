"""What vLLM's workers are asked for, by remote call into whatever process they run in.

vLLM adds this class to its own worker class (``worker_extension_cls``), so nothing has to be pickled and the
same calls work in one process, in several, and on several GPUs. An answer holds only plain values.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch

PACKED = re.compile(r"(weight_packed|qweight)$")
NOT_WEIGHTS = re.compile(r"(scale|scales|zero_point|qzeros|shape|g_idx|global_scale|sort_indices)$")


class WorkerExtension:
    """Methods of a vLLM worker; `model_runner`, `device` and `vllm_config` are the worker's own."""

    model_runner: Any
    device: Any
    vllm_config: Any

    def hlwq_facts(self) -> dict[str, Any]:
        """What was loaded: sizes in bytes, seconds, and the names of the kernels in use."""
        from vllm.compilation.counter import compilation_counter

        model = self.model_runner.model
        compilation = self.vllm_config.compilation_config
        return {
            # of the device as vLLM measured it while loading; its CPU runner does not measure
            "weights_bytes": getattr(self.model_runner, "model_memory_usage", None) or _weights_bytes(model),
            "parameters": _parameters(model),
            "kv_cache_bytes": _storage_bytes(_tensors(self.model_runner.kv_caches)),
            "graphs_captured": compilation_counter.num_cudagraph_captured,
            "compilation_s": float(compilation.compilation_time),
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


def _weights_bytes(model: torch.nn.Module) -> int:
    return _storage_bytes([*model.parameters(), *model.buffers()])


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


def _parameters(model: torch.nn.Module) -> int:
    """Weights of the model as it was before packing, on this worker."""
    total = 0
    for name, parameter in model.named_parameters():
        if PACKED.search(name):
            holder = model.get_submodule(name.rpartition(".")[0])
            total += parameter.numel() * parameter.element_size() * 8 // _bits(holder)
        elif not NOT_WEIGHTS.search(name):
            total += parameter.numel()
    return total


def _bits(layer: Any) -> int:
    """Bits of a packed weight, from whichever of vLLM's places this layer keeps them in; 4 if in none."""
    for holder in (getattr(layer, "scheme", None), getattr(layer, "quant_method", None)):
        for place in ("num_bits", "weight_bits", "bits"):
            if isinstance(bits := getattr(holder, place, None), int):
                return bits
    return 4


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
    backends = (getattr(layer, "attn_backend", None) for layer in model.modules())
    return dict(Counter(backend.get_name() for backend in backends if backend is not None))
