"""What an expert file is: its name, its header and where each record lies.

::

    FOLDER/<fingerprint>-<layout>-v<version>.experts
        0       magic, header length, SHA-256 of the header, header (JSON), zeros
        65536   records [layers, experts, record bytes]
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

LAYOUT_VERSION = 1
SUFFIX = ".experts"
MAGIC = b"hlwq-eval experts\n"
HEADER_BYTES = 65536


@dataclass(frozen=True)
class Header:
    """What a file holds.

    Attributes:
        fingerprint, checkpoint, source: of the checkpoint: its hash, its name, and where it lay.
        layers: numbers of the layers that have experts, in the order in which they are stored.
        fields: [name, dtype, shape] of each field of a record.
        samples: CRC-32 of the first record of each layer; empty before the file is written.
    """

    fingerprint: str
    checkpoint: str
    source: str
    layers: tuple[int, ...]
    experts: int
    record_bytes: int
    fields: tuple[tuple[Any, ...], ...]
    samples: tuple[int, ...] = ()
    version: int = LAYOUT_VERSION

    @property
    def layer_bytes(self) -> int:
        return self.experts * self.record_bytes

    @property
    def file_bytes(self) -> int:
        return HEADER_BYTES + len(self.layers) * self.layer_bytes

    @property
    def name(self) -> str:
        shape = json.dumps([self.layers, self.experts, self.fields])
        return (
            f"{self.fingerprint[:16]}-{hashlib.sha256(shape.encode()).hexdigest()[:8]}"
            f"-v{self.version}{SUFFIX}"
        )

    def offset(self, row: int, expert: int) -> int:
        """Where a record starts; `row` counts layers as they are stored."""
        return HEADER_BYTES + row * self.layer_bytes + expert * self.record_bytes

    def encode(self) -> bytes:
        text = json.dumps(asdict(self)).encode()
        head = MAGIC + len(text).to_bytes(4, "little") + hashlib.sha256(text).digest() + text
        if len(head) > HEADER_BYTES:
            raise ValueError(f"a header of {len(head)} bytes does not fit in {HEADER_BYTES}")
        return head.ljust(HEADER_BYTES, b"\0")

    @classmethod
    def decode(cls, head: bytes) -> "Header":
        """Raises ValueError: not a header of this version, or damaged."""
        start = len(MAGIC)
        if head[:start] != MAGIC:
            raise ValueError("it is not an expert file")
        length = int.from_bytes(head[start : start + 4], "little")
        digest, text = head[start + 4 : start + 36], head[start + 36 : start + 36 + length]
        if hashlib.sha256(text).digest() != digest:
            raise ValueError("its header is damaged")
        values = json.loads(text)
        if values["version"] != LAYOUT_VERSION:
            raise ValueError(f"its layout has version {values['version']}, not {LAYOUT_VERSION}")
        return cls(**{field.name: _frozen(values[field.name]) for field in fields(cls)})


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
