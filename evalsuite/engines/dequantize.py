"""Quantized checkpoints back into plain weights, tensor by tensor.

What a stored format *means* is defined here: the order of its bits, the Hadamard matrix, the decoding. How
weights get into it is the quantizer's business (``evalsuite/quant/``), which imports these functions, so that
one piece of code decodes for the engine and for the quantizer's own error measurement. Two formats:

- INT4 of compressed-tensors (``pack-quantized``, symmetric): ``weight_packed`` int32 [out, in/8], eight
  codes −8…7 stored as code + 8, least significant nibble first; ``weight_scale`` [out, groups];
  ``weight_shape`` [2]. Ŵ = code · scale. https://github.com/vllm-project/compressed-tensors
- HLWQ: ``weight_codes`` uint8 [out, bytes], see `unpack_codes`; ``weight_norms`` float16 [out, blocks];
  ``weight_shape`` [2]. Per block of a row, Ŵ = norm · levels[code] · H. The levels are part of the
  checkpoint's configuration, so reading needs no knowledge of the codebook they came from.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from evalsuite.core.errors import ModelError

PACKED, SCALE, CODES, NORMS, SHAPE = (
    "weight_packed", "weight_scale", "weight_codes", "weight_norms", "weight_shape"
)  # fmt: skip
INT4_OFFSET = 8


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint: `value` is float32 where it `was_quantized`, else as it is stored."""

    name: str
    value: Tensor
    was_quantized: bool


@lru_cache(maxsize=16)
def hadamard_matrix(size: int, device: torch.device) -> Tensor:
    """The orthonormal Walsh–Hadamard matrix in Sylvester's order, float32 [size, size]; H·H = I.

    Args:
        size: a power of two.
    """
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix * size**-0.5


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """HLWQ's bit stream back into codes: uint8 [..., 8n/bits] from uint8 [..., n].

    A row is one little-endian stream: code i takes the stream's bits i·bits … (i+1)·bits − 1, and bit k of
    the stream is bit k mod 8 of byte k div 8, the least significant first. Eight codes fill `bits` bytes.
    """
    groups = packed.unflatten(-1, (-1, bits))
    words = groups[..., 0].to(torch.int64)
    for i in range(1, bits):
        words |= groups[..., i].to(torch.int64) << 8 * i
    codes = torch.empty(*words.shape, 8, dtype=torch.uint8, device=packed.device)
    for i in range(8):
        codes[..., i] = (words >> bits * i) & (2**bits - 1)
    return codes.flatten(-2)


def unpack_int4(packed: Tensor, columns: int) -> Tensor:
    """Codes −8…7 from compressed-tensors' words: int8 [..., columns] from int32 [..., ⌈columns/8⌉]."""
    codes = torch.empty(*packed.shape, 8, dtype=torch.int8, device=packed.device)
    for i in range(8):
        codes[..., i] = (packed >> 4 * i) & 15
    return (codes - INT4_OFFSET).flatten(-2)[..., :columns]


def decode_hlwq(codes: Tensor, norms: Tensor, levels: Tensor, *, hadamard: bool, columns: int) -> Tensor:
    """Weights from HLWQ codes, float32 [..., columns].

    Args:
        codes: uint8 [..., blocks · block size].
        norms: float16 [..., blocks]; a block of norm 0 decodes to zeros.
        levels: float32 [2^bits], the value of each code for a block of norm 1.
        hadamard: whether blocks were rotated before they were coded.
        columns: the weight's own width; the last block may have been padded.
    """
    blocks = levels.index_select(0, codes.flatten().int()).view(*norms.shape, -1)
    if hadamard:
        blocks = blocks @ hadamard_matrix(blocks.shape[-1], blocks.device)
    blocks *= norms.float().unsqueeze(-1)
    return blocks.flatten(-2)[..., :columns]


def decode_int4(codes: Tensor, scales: Tensor) -> Tensor:
    """Weights from INT4 codes, float32 [..., columns].

    Args:
        codes: int8 [..., columns].
        scales: [..., groups]; the groups divide the columns evenly.
    """
    groups = codes.float().unflatten(-1, (scales.shape[-1], -1))
    return (groups * scales.float().unsqueeze(-1)).flatten(-2)


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Whether a config.json declares quantized weights, of whatever kind."""
    return bool(quantization_of(config))


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """A multimodal configuration may declare it for its text model alone."""
    text = config.get("text_config") or {}
    return config.get("quantization_config") or text.get("quantization_config") or {}


def dequantize_state(folder: Path, without: re.Pattern[str] | None = None) -> Iterator[StoredTensor]:
    """Every weight of a quantized checkpoint under the name it has in an unquantized one.

    Reads one tensor at a time. Experts come as the per-expert matrices that are stored; transformers stacks
    them on loading.

    Args:
        without: stored names that are left out.

    Raises:
        ModelError: the kind of quantization cannot be read here, or a file is damaged.
    """
    quantization = quantization_of(json.loads((folder / "config.json").read_text()))
    parts = quantized_parts(folder.name, quantization)
    with ExitStack() as stack:
        try:
            paths = sorted(folder.glob("*.safetensors"))
            files = [stack.enter_context(safe_open(path, "pt")) for path in paths]
            home = {name: file for file in files for name in file.keys()}  # noqa: SIM118 not a dict
            for name, file in home.items():
                if without is not None and without.fullmatch(name):
                    continue
                stem, _, part = name.rpartition(".")
                if part == parts[0]:
                    payload, scales, shape = (home[f"{stem}.{p}"].get_tensor(f"{stem}.{p}") for p in parts)
                    columns = int(shape[1])
                    value = decode_stored(payload, scales, columns, quantization)
                    yield StoredTensor(f"{stem}.weight", value, True)
                elif f"{stem}.{parts[0]}" not in home or part not in parts:
                    yield StoredTensor(name, file.get_tensor(name), False)
        except (SafetensorError, KeyError) as error:
            raise ModelError(
                f"The weights in {folder.name} are damaged or incomplete.",
                cause=str(error),
                todo="download or quantize the checkpoint again.",
            ) from error


def decode_stored(payload: Tensor, scales: Tensor, columns: int, quantization: Mapping[str, Any]) -> Tensor:
    """One weight from its stored parts, float32, as the checkpoint's `quantization_of` says."""
    if quantization["quant_method"] == "hlwq":
        return decode_hlwq(
            unpack_codes(payload, quantization["bits"]),
            scales,
            torch.tensor(quantization["levels"], dtype=torch.float32),
            hadamard=quantization["hadamard"],
            columns=columns,
        )
    return decode_int4(unpack_int4(payload, columns), scales)


def quantized_parts(name: str, quantization: Mapping[str, Any]) -> tuple[str, str, str]:
    """The stored tensors that make up one weight: payload, scales, shape.

    Raises:
        ModelError: neither HLWQ nor symmetric INT4 without activation order.
    """
    method = quantization.get("quant_method")
    if method == "hlwq":
        return CODES, NORMS, SHAPE
    problem = f"its quant_method is {method!r}"
    if method == "compressed-tensors":
        groups = [group.get("weights") or {} for group in quantization.get("config_groups", {}).values()]
        odd = [
            weights
            for weights in groups
            if (weights.get("num_bits"), weights.get("type", "int"), weights.get("symmetric", True))
            != (4, "int", True)
            or weights.get("strategy") not in ("group", "channel")
            or weights.get("actorder") not in (None, False, "weight", "static")
        ]
        if groups and not odd and quantization.get("format") == "pack-quantized":
            return PACKED, SCALE, SHAPE
        problem = f"its format is {quantization.get('format')!r} with weights {odd or groups}"
    raise ModelError(
        f"The quantized checkpoint {name} cannot be dequantised here.",
        cause=problem + "; readable are HLWQ codes and compressed-tensors pack-quantized, symmetric 4-bit "
        "integers in groups or channels.",
        todo="run it in vLLM (--engine vllm), or give the unquantized checkpoint.",
    )
