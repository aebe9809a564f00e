"""Mixture-of-experts layers on a CPU: the experts' matrix products in a few shapes instead of thousands.

oneDNN compiles a kernel for each shape it meets and keeps the last 1,024. Every expert of every batch gets
another number of tokens, so transformers' grouped product compiles nearly as often as it multiplies. Rounding
the row counts up to a multiple of 64 leaves a handful of shapes; the extra rows belong to the next expert and
their products are thrown away. A batch of no more than 64 rows in all, as in decoding, has few shapes anyway:
there, 8 is enough.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "rows_of_64"
ROWS, FEW_ROWS = 64, 8


def use_on(model: Any) -> int:
    """Switch the expert layers of `model` to this implementation; returns how many there are."""
    layers = expert_modules(model)
    for layer in layers:
        layer.config._experts_implementation = NAME
    return len(layers)


def expert_modules(model: Any) -> list[Any]:
    """Gated experts without bias in [expert, out, in] layout, as the Qwen families have them."""
    return [m for m in model.modules() if _fits(m)]


def _fits(module: torch.nn.Module) -> bool:
    return (
        getattr(module, "has_gate", False)
        and not getattr(module, "has_bias", True)
        and not getattr(module, "is_transposed", True)
    )


class RowsByExpert:
    """A batch's rows, sorted by expert, and what the experts make of them.

    The arithmetic of a row depends on its own expert's rows alone, not on the order in which experts come.

    Args:
        hidden_states: [tokens, hidden].
        top_k_index: [tokens, k], the experts of each token.
        experts: how many the layer has.

    Attributes:
        experts: those that have rows, ascending.
    """

    def __init__(self, hidden_states: Tensor, top_k_index: Tensor, experts: int) -> None:
        tokens, width = hidden_states.shape
        self._k = top_k_index.shape[1]
        self._count = tokens * self._k
        self._step = ROWS if self._count > ROWS else FEW_ROWS
        self._order = torch.argsort(top_k_index.reshape(-1), stable=True)
        counts = torch.bincount(top_k_index.reshape(-1), minlength=experts)
        self._counts = counts.tolist()
        self._starts = (counts.cumsum(0) - counts).tolist()
        self._rows = hidden_states.new_zeros(self._count + ROWS, width)
        self._rows[: self._count] = hidden_states[self._order // self._k]
        self._out = torch.empty_like(self._rows[: self._count])
        self.experts = [expert for expert, count in enumerate(self._counts) if count]

    def run(self, layer: Any, expert: int, gate_up: Tensor, down: Tensor) -> None:
        """Send the rows of one expert through it.

        Args:
            layer: the experts' module, for its activation.
            gate_up, down: the expert's weights, [2 · intermediate, hidden] and [hidden, intermediate].
        """
        start, count = self._starts[expert], self._counts[expert]
        rows = self._rows[start : start + -(-count // self._step) * self._step]
        gated = layer._apply_gate(torch.nn.functional.linear(rows, gate_up))
        self._out[start : start + count] = torch.mm(gated, down.T)[:count]

    def combine(self, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts, [tokens, hidden]; `top_k_weights` is [tokens, k]."""
        in_order = torch.empty_like(self._out)
        in_order[self._order] = self._out
        weighted = in_order.view(-1, self._k, self._out.shape[1]) * top_k_weights[..., None]
        return weighted.sum(dim=1).to(self._out.dtype)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Same mathematics as transformers' ``grouped_mm``; inference only.

    Args:
        hidden_states: [tokens, hidden].
        top_k_index, top_k_weights: [tokens, k], the experts of each token and their weights.

    Returns:
        [tokens, hidden].
    """
    rows = RowsByExpert(hidden_states, top_k_index, self.num_experts)
    for expert in rows.experts:
        rows.run(self, expert, self.gate_up_proj[expert], self.down_proj[expert])
    return rows.combine(top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
