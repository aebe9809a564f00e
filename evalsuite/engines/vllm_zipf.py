"""Skewed routing for vLLM's routing simulator, which itself draws experts uniformly or from a normal law.

A token takes k different experts, drawn one after the other with probabilities ∝ rank^−S (Zipf's law), where
an expert's rank is its number; independent of other tokens and of other layers. The k highest of Gumbel noise
plus log-probabilities are such a draw (Kool et al. 2019, https://arxiv.org/abs/1903.06059).
"""

from typing import Any

import torch

PREFIX = "zipf:"


def install(name: str) -> None:
    """Make a routing known to the vLLM of this process, under its name.

    Args:
        name: ``zipf:S``; any other is vLLM's own business.
    """
    if not name.startswith(PREFIX):
        return
    from vllm.model_executor.layers.fused_moe.router import routing_simulator_router as simulator

    class Zipf(simulator.RoutingStrategy):
        def route_tokens(
            self, hidden_states: Any, router_logits: torch.Tensor, top_k: int, indices_type: Any = None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            del hidden_states
            ids = draw(router_logits, top_k, exponent).to(indices_type or torch.int64)
            return torch.full(ids.shape, 1.0 / top_k, device=ids.device), ids

    exponent = float(name.removeprefix(PREFIX))
    simulator.RoutingSimulator.register_strategy(name, Zipf())


def draw(like: torch.Tensor, top_k: int, exponent: float) -> torch.Tensor:
    """Experts of each token, int64 [tokens, top_k].

    Args:
        like: tells tokens, experts and device, [tokens, experts].
    """
    ranks = torch.arange(1, like.shape[-1] + 1, device=like.device, dtype=torch.float32)
    noise = torch.empty(like.shape, device=like.device, dtype=torch.float32).exponential_().log().neg()
    return (noise - exponent * ranks.log()).topk(top_k, dim=-1).indices
