"""How one expert lies in memory: a record of bytes with a fixed field order.

Every expert of a checkpoint has the same record, so a store is an array [layers, experts, record bytes] and
the slots of a device are an array [slots, record bytes]. Fields start at multiples of 256 bytes, which is
what matrix kernels and copies like best.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

ALIGNMENT = 256


@dataclass(frozen=True)
class Field:
    """One tensor of an expert; `dtype` is torch's name for it, such as ``bfloat16``."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class RecordLayout:
    """The fields of an expert, in the order in which they are stored."""

    fields: tuple[Field, ...]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each field starts, in bytes; the last number is the length of a record."""
        ends = [0]
        for field in self.fields:
            ends.append(-(-(ends[-1] + field.bytes) // ALIGNMENT) * ALIGNMENT)
        return tuple(ends)

    @property
    def record_bytes(self) -> int:
        return self.offsets[-1]

    def views(self, records: Tensor) -> dict[str, Tensor]:
        """Each field of many records as a tensor [..., *shape] over the same memory.

        Args:
            records: uint8 [..., record_bytes], contiguous along the last dimension.
        """
        return {
            field.name: records[..., start : start + field.bytes]
            .view(getattr(torch, field.dtype))
            .unflatten(-1, field.shape)
            for field, start in zip(self.fields, self.offsets, strict=False)
        }


def layout_of(parts: Mapping[str, Tensor]) -> RecordLayout:
    """The layout of an expert with these tensors."""
    return RecordLayout(
        tuple(Field(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in parts.items())
    )
