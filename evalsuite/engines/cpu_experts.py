"""Mixture-of-experts layers on a CPU: the experts' matrix products in a few shapes instead of thousands.

oneDNN compiles a kernel for each shape it meets and keeps the last 1,024. Every expert of every batch gets
another number of tokens, so transformers' grouped product compiles nearly as often as it multiplies. Rounding
the row counts up to a multiple of 64 leaves a handful of shapes; the extra rows belong to the next expert and
are overwritten by its own product right after.
"""

from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "rows_of_64"
ROWS = 64


def use_on(model: Any) -> int:
    """Switch the expert layers of `model` to this implementation; returns how many there are."""
    layers = [m for m in model.modules() if _fits(m)]
    for layer in layers:
        layer.config._experts_implementation = NAME
    return len(layers)


def _fits(module: torch.nn.Module) -> bool:
    """Gated experts without bias in [expert, out, in] layout, as the Qwen families have them."""
    return (
        getattr(module, "has_gate", False)
        and not getattr(module, "has_bias", True)
        and not getattr(module, "is_transposed", True)
    )


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Same mathematics as transformers' ``grouped_mm``; inference only.

    Args:
        hidden_states: [tokens, hidden].
        top_k_index, top_k_weights: [tokens, k], the experts of each token and their weights.

    Returns:
        [tokens, hidden].
    """
    tokens, width = hidden_states.shape
    k = top_k_index.shape[1]
    by_expert = torch.argsort(top_k_index.reshape(-1), stable=True)
    counts = torch.bincount(top_k_index.reshape(-1), minlength=self.num_experts).tolist()
    rows = hidden_states.new_zeros(tokens * k + ROWS, width)
    rows[: tokens * k] = hidden_states[by_expert // k]
    out = torch.empty_like(rows)
    start = 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        stop = start + -(-count // ROWS) * ROWS
        gated = self._apply_gate(torch.nn.functional.linear(rows[start:stop], self.gate_up_proj[expert]))
        torch.mm(gated, self.down_proj[expert].T, out=out[start:stop])
        start += count
    in_order = torch.empty_like(rows[: tokens * k])
    in_order[by_expert] = out[: tokens * k]
    weighted = in_order.view(tokens, k, width) * top_k_weights[..., None]
    return weighted.sum(dim=1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
