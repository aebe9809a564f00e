"""From axes to cells and to groups that share a loaded model."""

from itertools import pairwise

import pytest

from evalsuite.core.errors import UsageError
from evalsuite.core.spec import Serving, Workload, spec_hash
from evalsuite.core.sweep import Axes, cells, groups, label, reference_cells

WORKLOAD = Workload(corpus="builtin")


def span(serving=None, **axes):
    return cells(Axes(**{"models": ("m",)} | axes), serving or Serving(), WORKLOAD)


def test_the_cells_are_the_product_of_the_axes():
    found = span(cache_sizes=(8, None), modes=("eager", "graphs"), gpus=(0, 1), concurrencies=(1, 8))
    assert len(found) == len({spec_hash(cell) for cell in found}) == 16
    assert {cell.serving.gpus for cell in found} == {(0,), (1,)}
    assert {cell.workload.concurrency for cell in found} == {1, 8}


def test_a_baseline_has_no_expert_cache():
    found = span(models=("int4", "bf16"), cache_sizes=(8, 64))
    sizes = [(cell.model, cell.serving.moe_expert_cache_size) for cell in found]
    assert sizes == [("int4", 8), ("int4", 64), ("bf16", None)]


def test_cached_cells_get_an_uncached_one_to_be_held_against():
    axes = Axes(
        models=("int4", "bf16"),
        cache_sizes=(8,),
        modes=("graphs", "eager"),
        gpus=(0, 1),
        concurrencies=(1, 8),
    )
    found = reference_cells(axes, Serving(), WORKLOAD)
    assert [label(cell) for cell in found] == [
        "int4, eager, GPU 0, concurrency 1", "int4, eager, GPU 0, concurrency 8",
    ]  # fmt: skip
    assert reference_cells(axes.model_copy(update={"cache_sizes": (8, None)}), Serving(), WORKLOAD) == []


def test_tensor_parallel_cells_take_neighbouring_gpus():
    found = span(gpus=(0, 1, 2, 3), tensor_parallel_sizes=(1, 2))
    assert [cell.serving.gpus for cell in found] == [(0,), (1,), (2,), (3,), (0, 1), (2, 3)]
    assert [cell.serving.tensor_parallel_size for cell in found] == [1, 1, 1, 1, 2, 2]
    with pytest.raises(UsageError, match="3 GPUs cannot be cut into sets of 2"):
        span(gpus=(0, 1, 2), tensor_parallel_sizes=(2,))


def test_what_all_cells_share_is_kept():
    (cell,) = span(Serving(dtype="float32", additional_config={"a": 1}))
    assert (cell.serving.dtype, cell.serving.additional_config) == ("float32", {"a": 1})


def test_a_group_differs_in_cache_size_and_concurrency_alone():
    chosen = span(
        models=("a", "b"), cache_sizes=(8, 64, None), modes=("eager", "graphs"), concurrencies=(1, 2)
    )
    found = groups(chosen, seed=5)
    assert sorted(map(spec_hash, chosen)) == sorted(spec_hash(c) for group in found for c in group)
    assert len(found) == 4
    for group in found:
        assert len({(c.model, c.serving.enforce_eager) for c in group}) == 1
        sizes = [c.serving.moe_expert_cache_size for c in group]
        assert sum(a != b for a, b in pairwise(sizes)) == len(set(sizes)) - 1


def test_the_seed_decides_the_order():
    chosen = span(cache_sizes=(1, 2, 4, 8, 16, None), modes=("eager", "graphs"))
    assert groups(chosen, 1) == groups(chosen, 1)
    assert len({str(groups(chosen, seed)) for seed in range(5)}) > 1
    assert [c for g in groups(chosen, 1) for c in g] != chosen


def test_labels():
    found = span(cache_sizes=(8,), modes=("graphs",), gpus=(0, 1), tensor_parallel_sizes=(2,))
    assert label(found[0]) == "m, cache 8, graphs, GPU 0+1, concurrency 1"
    assert label(span()[0]) == "m, eager, concurrency 1"
