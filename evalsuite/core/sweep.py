"""A sweep: axes, the cells that they span, and the groups of cells that one loading of a model serves.

A cell is one `SpeedSpec`, a point of

    model × cache size × eager or graphs × GPU × tensor parallel × concurrency

A group is what differs in cache size and concurrency alone. Groups, the cache sizes within a group and the
concurrencies within a size come in an order drawn with a recorded seed, so that a drift of the machine, such
as a GPU that grows warm, does not favour one end of an axis.
"""

import random
from collections.abc import Sequence
from typing import Literal

from evalsuite.core.errors import UsageError
from evalsuite.core.spec import Serving, SpeedSpec, Workload
from evalsuite.core.value import Value

Mode = Literal["eager", "graphs"]
UNCACHED = {
    name: Serving.model_fields[name].default for name in ("moe_expert_cache_policy", "moe_expert_store")
}


class Axes(Value):
    """What varies. The other settings come from a `Serving` and a `Workload` that all cells share.

    Attributes:
        models: the candidate first, then baselines, which run without an expert cache only.
        cache_sizes: experts of each layer on the device; None for all.
        gpus: indices; empty leaves the choice to the engine.
        tensor_parallel_sizes: each takes so many of `gpus` for one cell.
    """

    models: tuple[str, ...]
    cache_sizes: tuple[int | None, ...] = (None,)
    modes: tuple[Mode, ...] = ("eager",)
    gpus: tuple[int, ...] = ()
    tensor_parallel_sizes: tuple[int, ...] = (1,)
    concurrencies: tuple[int, ...] = (1,)


def cells(axes: Axes, serving: Serving, workload: Workload) -> list[SpeedSpec]:
    """Every cell, in the order of the axes; one without an expert cache has neither policy nor store.

    Raises:
        UsageError: a tensor-parallel size needs more GPUs than are given.
    """
    return [
        SpeedSpec(
            model=model,
            serving=serving.model_copy(
                update={
                    "gpus": gpus, "tensor_parallel_size": len(gpus) or size,
                    "enforce_eager": mode == "eager", "moe_expert_cache_size": slots,
                } | (UNCACHED if slots is None else {})
            ),
            workload=workload.model_copy(update={"concurrency": concurrency}),
        )
        for place, model in enumerate(axes.models)
        for size in axes.tensor_parallel_sizes
        for gpus in gpu_sets(axes.gpus, size)
        for mode in axes.modes
        for slots in (axes.cache_sizes if place == 0 else (None,))
        for concurrency in axes.concurrencies
    ]  # fmt: skip


def reference_cells(axes: Axes, serving: Serving, workload: Workload) -> list[SpeedSpec]:
    """Uncached cells that the tokens of cached ones can be held against, where the axes have none.

    One for each concurrency, in eager mode if that is among the modes, on the first GPUs. Where experts are
    drawn at random, no two runs write the same, and there are none.
    """
    if None in axes.cache_sizes or serving.moe_routing != "model":
        return []
    size = axes.tensor_parallel_sizes[0]
    changes = {
        "models": axes.models[:1], "cache_sizes": (None,), "gpus": axes.gpus[:size],
        "modes": ("eager",) if "eager" in axes.modes else axes.modes[:1], "tensor_parallel_sizes": (size,),
    }  # fmt: skip
    return cells(axes.model_copy(update=changes), serving, workload)


def gpu_sets(gpus: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """The GPUs cut into sets of `size`; one empty set where the engine chooses.

    Raises:
        UsageError: there are fewer GPUs, or they do not divide evenly.
    """
    if not gpus:
        return [()]
    if len(gpus) % size:
        raise UsageError(
            f"{len(gpus)} GPUs cannot be cut into sets of {size} for --tensor-parallel-size {size}.",
            todo="give --gpus a multiple of every tensor-parallel size.",
        )
    return [tuple(gpus[start : start + size]) for start in range(0, len(gpus), size)]


def groups(chosen: Sequence[SpeedSpec], seed: int) -> list[list[SpeedSpec]]:
    """The cells that share a loaded model, in the order in which they are to run.

    Cells of one cache size stay together: an engine that cannot change it loads once a size.
    """
    rng = random.Random(seed)
    by_load: dict[str, dict[int | None, list[SpeedSpec]]] = {}
    for cell in chosen:
        load = cell.model + cell.serving.model_copy(update={"moe_expert_cache_size": None}).model_dump_json()
        by_load.setdefault(load, {}).setdefault(cell.serving.moe_expert_cache_size, []).append(cell)
    order = list(by_load.values())
    rng.shuffle(order)
    return [[cell for size in _shuffled(rng, sizes) for cell in size] for sizes in order]


def _shuffled(rng: random.Random, sizes: dict[int | None, list[SpeedSpec]]) -> list[list[SpeedSpec]]:
    order = list(sizes.values())
    rng.shuffle(order)
    for same in order:
        rng.shuffle(same)
    return order


def label(cell: SpeedSpec) -> str:
    """A cell in one line, for progress and messages."""
    # of a path, the last part tells models apart well enough
    serving, parts = cell.serving, [cell.model.rstrip("/").rpartition("/")[2]]
    if serving.moe_expert_cache_size is not None:
        parts.append(f"cache {serving.moe_expert_cache_size}")
    if serving.server_url is None:  # a server that runs already has a mode of its own
        parts.append("eager" if serving.enforce_eager else "graphs")
    if serving.gpus:
        parts.append(f"GPU {'+'.join(map(str, serving.gpus))}")
    elif serving.tensor_parallel_size > 1:
        parts.append(f"tensor parallel {serving.tensor_parallel_size}")
    parts.append(f"concurrency {cell.workload.concurrency}")
    return ", ".join(parts)
