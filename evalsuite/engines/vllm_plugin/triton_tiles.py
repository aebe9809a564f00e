"""The tiles of vLLM's Triton experts, chosen as if all experts of the layer were there.

vLLM looks tile sizes up by the number of experts in the weights. With slots instead of experts it would find
other ones, or none, so that a cached step would add in another order than one without a cache.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

_experts: list[int] = []


@contextmanager
def tiles_for(experts: int) -> Iterator[None]:
    """While this lasts, tiles are looked up for so many experts."""
    _experts.append(experts)
    try:
        yield
    finally:
        _experts.pop()


def with_all_experts(choose: Callable[..., Any]) -> Callable[..., Any]:
    """`try_get_optimal_moe_config` with the first dimension of both weights' shapes replaced."""

    def chosen(w1_shape: Any, w2_shape: Any, *args: Any, **kwargs: Any) -> Any:
        if _experts:
            w1_shape, w2_shape = ((_experts[-1], *shape[1:]) for shape in (w1_shape, w2_shape))
        return choose(w1_shape, w2_shape, *args, **kwargs)

    return chosen


def install() -> None:
    """Let vLLM's Triton experts ask through `with_all_experts`; once in a process."""
    from vllm.model_executor.layers.fused_moe import experts

    triton_moe: Any = import_module(f"{experts.__name__}.triton_moe")
    choose: Any = triton_moe.try_get_optimal_moe_config
    if choose.__module__ != __name__:
        triton_moe.try_get_optimal_moe_config = with_all_experts(choose)
