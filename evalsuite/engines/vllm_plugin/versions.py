"""The versions of vLLM that the cache knows, and what differs between them where it takes hold.

Read in the source of each: a version that is not listed may have moved what the cache builds on, so it is
refused rather than patched in the hope that it fits.
"""

import importlib
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from evalsuite.core.errors import UsageError

_COMPRESSED = "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe"
_UNQUANTIZED = "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method"


@dataclass(frozen=True)
class Adapter:
    """Where one version of vLLM keeps the MoE methods that can be cached.

    Attributes:
        releases: (major, minor) of the releases whose source was read.
        wna16: module and class of the compressed-tensors INT4 method.
        unquantized: module and class of the BF16 method.
    """

    releases: tuple[tuple[int, int], ...]
    wna16: tuple[str, str]
    unquantized: tuple[str, str] = (_UNQUANTIZED, "UnquantizedFusedMoEMethod")

    def methods(self) -> tuple[type[Any], ...]:
        """The classes, imported."""
        return tuple(
            getattr(importlib.import_module(module), name) for module, name in (self.wna16, self.unquantized)
        )


ADAPTERS = (
    Adapter(
        ((0, 26),),
        (f"{_COMPRESSED}.compressed_tensors_moe_wna16_marlin", "CompressedTensorsWNA16MarlinMoEMethod"),
    ),
    Adapter(
        ((0, 32), (0, 33)),
        (f"{_COMPRESSED}.compressed_tensors_moe_wna16", "CompressedTensorsWNA16MoEMethod"),
    ),
)


def find_adapter(installed: str | None = None) -> Adapter:
    """The adapter of the installed vLLM, or of a version that is named.

    Raises:
        UsageError: the cache does not know that version.
    """
    if installed is None:
        installed = version("vllm")
    parts = installed.split("+")[0].split(".")
    release = tuple(int(p) for p in parts[:2]) if all(p.isdigit() for p in parts[:2]) else ()
    for adapter in ADAPTERS:
        if release in adapter.releases:
            return adapter
    known = ", ".join(f"{a}.{b}" for adapter in ADAPTERS for a, b in adapter.releases)
    raise UsageError(
        f"The expert cache does not know vLLM {installed}.",
        cause=f"it takes hold inside vLLM's MoE layers, which it knows in the releases {known}.",
        todo="install one of those, or leave --moe-expert-cache-size away.",
    )
