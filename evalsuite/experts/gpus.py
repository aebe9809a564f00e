"""GPUs by name, as their vendor's data sheets describe them: for predictions, never for measurements.

Memory sizes of data sheets are binary (a card of 24 GB reports 24 GiB), bandwidths decimal. The host link is
one direction of PCI Express: lanes · 16 GT/s in generation 4, 32 GT/s in generation 5, in 128b/130b code
(PCI-SIG, PCI Express Base Specification 4.0 and 5.0). What a copy reaches is less.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from evalsuite.core.errors import UsageError

GIB = 1 << 30
TRANSFERS_PER_S = {3: 8e9, 4: 16e9, 5: 32e9}


@dataclass(frozen=True)
class GpuSheet:
    """One data sheet.

    Attributes:
        memory_gib: capacity.
        bandwidth_bytes_per_s: of the device's own memory, at its peak.
        pcie, lanes: generation and width of the link to the host.
        source: the document.
    """

    key: str
    name: str
    memory_gib: int
    bandwidth_bytes_per_s: float
    pcie: int
    lanes: int
    source: str

    @property
    def memory_bytes(self) -> int:
        return self.memory_gib * GIB

    @property
    def link_bytes_per_s(self) -> float:
        """The most that one direction of the host link carries."""
        return TRANSFERS_PER_S[self.pcie] * self.lanes * 128 / 130 / 8


_ALL = (
    GpuSheet(
        "rtx-3090", "GeForce RTX 3090", 24, 936e9, 4, 16, "NVIDIA, Ampere GA102 GPU Architecture white paper"
    ),
    GpuSheet(
        "rtx-4090", "GeForce RTX 4090", 24, 1008e9, 4, 16, "NVIDIA, Ada GPU Architecture white paper"
    ),
    GpuSheet(
        "rtx-5090", "GeForce RTX 5090", 32, 1792e9, 5, 16,
        "NVIDIA, RTX Blackwell GPU Architecture white paper",
    ),
    GpuSheet(
        "rtx-pro-6000", "RTX PRO 6000 Blackwell", 96, 1792e9, 5, 16,
        "NVIDIA, RTX PRO 6000 Blackwell Workstation Edition data sheet",
    ),
    GpuSheet("l40s", "L40S", 48, 864e9, 4, 16, "NVIDIA, L40S data sheet"),
    GpuSheet("a100", "A100 80GB SXM", 80, 2039e9, 4, 16, "NVIDIA, A100 80GB data sheet"),
    GpuSheet("h100", "H100 80GB SXM", 80, 3350e9, 5, 16, "NVIDIA, H100 data sheet"),
    GpuSheet("h200", "H200 141GB SXM", 141, 4800e9, 5, 16, "NVIDIA, H200 data sheet"),
)  # fmt: skip
GPUS = {gpu.key: gpu for gpu in _ALL}


def gpus_of(keys: Sequence[str]) -> list[GpuSheet]:
    """The data sheets called so, in order and once each.

    Raises:
        UsageError: there is none of that name here.
    """
    for key in keys:
        if key not in GPUS:
            raise UsageError(f"No GPU is called {key!r} here.", todo=f"choose from {', '.join(GPUS)}.")
    return [GPUS[key] for key in dict.fromkeys(keys)]
