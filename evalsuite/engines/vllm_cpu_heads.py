"""Linear attention with small heads in vLLM's CPU build, whose prefill kernel is compiled for 64 and 128.

The gated delta rule (https://arxiv.org/abs/2412.06464) keeps a state S [key, value] a head and reads it as
Sᵀq/√key. Zeros appended to keys, queries and values change no product; only the factor 1/√key, which the
kernel takes from the padded size, has to be put right. The built-in model's heads have 32.
"""

import math
from typing import Any

import torch
from torch.nn.functional import pad

from evalsuite.engines.vllm_arguments import CPU_LINEAR_HEADS


def install() -> None:
    """Let vLLM's kernel take heads of any size, in this process; does nothing where that is done already."""
    import vllm._custom_ops as ops

    kernel = ops.chunk_gated_delta_rule_cpu
    if getattr(kernel, "pads_heads", False):
        return

    def padded(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **rest: Any) -> Any:
        return pad_heads(kernel, query, key, value, **rest)

    padded.pads_heads = True  # pyright: ignore[reportFunctionMemberAccess]
    ops.chunk_gated_delta_rule_cpu = padded


def pad_heads(
    kernel: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    initial_state: torch.Tensor,
    initial_state_indices: torch.Tensor,
    **rest: Any,
) -> Any:
    """Call the kernel on padded heads.

    Args:
        query, key: [..., key]; value: [..., value].
        initial_state: [slots, heads, key, value], of which the kernel reads and writes those of
            `initial_state_indices`.

    Returns:
        As the kernel: the output [..., value] and the final state.
    """
    rows, columns = query.shape[-1], value.shape[-1]
    more_rows, more_columns = _missing(rows), _missing(columns)
    if not more_rows and not more_columns:
        return kernel(
            query, key, value,
            initial_state=initial_state, initial_state_indices=initial_state_indices, **rest,
        )  # fmt: skip
    slots = initial_state_indices.long()
    state = pad(initial_state[slots], (0, more_columns, 0, more_rows))
    out, _ = kernel(
        pad(query, (0, more_rows)), pad(key, (0, more_rows)), pad(value, (0, more_columns)),
        initial_state=state, initial_state_indices=torch.arange(len(slots), dtype=torch.int32), **rest,
    )  # fmt: skip
    initial_state[slots] = state[..., :rows, :columns]
    return out[..., :columns] * math.sqrt(1 + more_rows / rows), initial_state


def _missing(size: int) -> int:
    """Zeros up to the next size that is compiled; a larger head is left to the kernel's refusal."""
    return next((whole - size for whole in CPU_LINEAR_HEADS if whole >= size), 0)
