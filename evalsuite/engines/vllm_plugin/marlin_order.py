"""The order in which Marlin meets a step's experts: that of the experts, not of their slots.

Marlin cuts the work of a step into equal stripes, so that an expert's sums are split at places that depend on
which experts come before it. Sorted by slot a cached step would therefore differ in the last bits from one
without a cache; sorted by expert it has the same bits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from torch import Tensor

_steps: list[tuple[Tensor, Tensor]] = []


@contextmanager
def ordered_by_expert(topk_ids: Tensor, slot_of: Tensor) -> Iterator[None]:
    """While this lasts, Marlin sorts by `topk_ids` and reads from the slots in `slot_of`.

    Args:
        topk_ids: experts of each token, int [tokens, top_k].
        slot_of: the slot of each expert of the layer, -1 where it has none, int32 [experts].
    """
    _steps.append((topk_ids, slot_of))
    try:
        yield
    finally:
        _steps.pop()


def by_expert(align: Callable[..., Any], relabel: Callable[[Tensor, Tensor], None]) -> Callable[..., Any]:
    """`moe_align_block_size` of a step: aligned by expert, and then each block's expert named by its slot."""

    def aligned(topk_ids: Tensor, block: int, experts: int, expert_map: Any = None, **options: Any) -> Any:
        if not _steps or expert_map is not None:
            return align(topk_ids, block, experts, expert_map, **options)
        ids, slot_of = _steps[-1]
        sorted_ids, expert_ids, padded = align(ids, block, experts, None, **options)
        relabel(expert_ids, slot_of)
        return sorted_ids, expert_ids, padded

    return aligned


def install() -> None:
    """Let vLLM's Marlin experts align through `by_expert`; once in a process."""
    from vllm.model_executor.layers.fused_moe import experts

    from evalsuite.engines.vllm_plugin.device_cache import relabel

    marlin: Any = import_module(f"{experts.__name__}.marlin_moe")
    align: Any = marlin.moe_align_block_size
    if align.__module__ != __name__:
        marlin.moe_align_block_size = by_expert(align, relabel)
