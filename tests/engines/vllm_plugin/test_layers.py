"""Loading and one step of a cached method over a stand-in for vLLM's, against every expert at once in float64."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import Module, Parameter

from evalsuite.core.errors import UsageError
from evalsuite.engines.vllm_plugin.layers import layer_number, with_cache
from evalsuite.engines.vllm_plugin.settings import CacheSettings

EXPERTS, HIDDEN, TOP_K = 40, 16, 3


class Kernel:
    """Experts that are one matrix each, as vLLM calls them."""

    def __init__(self):
        self.calls = []

    def apply(self, hidden_states, w1, w2, topk_weights, topk_ids, expert_map, shared_experts, **rest):
        assert expert_map is None
        assert rest["global_num_experts"] == EXPERTS
        self.calls.append((len(w1), shared_experts))
        assert w1.shape[0] == w2.shape[0]
        assert ((topk_ids >= 0) & (topk_ids < len(w1))).all()
        each = torch.einsum("th,tkhd->tkd", hidden_states.float(), (w1 * w2)[topk_ids.long()].float())
        return (each * topk_weights[..., None]).sum(1).to(hidden_states.dtype)


class Method:
    """Registers, "repacks" (doubles) and computes; `w2` is made while repacking, as scales are."""

    is_monolithic = False
    unquantized_backend = SimpleNamespace(name="TRITON")

    def create_weights(self, layer, generator):
        layer.register_parameter(
            "w1_packed", Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=generator))
        )
        layer.register_parameter("w1_shape", Parameter(torch.zeros(EXPERTS, 2)))

    def process_weights_after_loading(self, layer):
        doubled = Parameter(2 * layer.w1_packed.data, requires_grad=False)
        layer.register_parameter("w1_packed", doubled)
        layer.register_parameter("w13_weight", doubled)
        layer.register_parameter(
            "w2_weight", Parameter(0.5 * torch.ones(len(doubled), 1, 1), requires_grad=False)
        )
        layer.register_parameter("workspace", Parameter(torch.zeros(1), requires_grad=False))
        self.moe_kernel = Kernel()


def make(size, policy="lru"):
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            get_num_layers=lambda _: 1, hf_text_config=SimpleNamespace(num_hidden_layers=4)
        ),
        parallel_config=SimpleNamespace(local_world_size=1),
        load_config=SimpleNamespace(load_format="auto"),
    )
    settings = CacheSettings(moe_expert_cache_size=size, moe_expert_cache_policy=policy)
    method = with_cache(Method(), (Method,), settings, "model.layers.3.mlp.experts", config)
    layer = Module()
    layer.register_parameter("e_score_correction_bias", Parameter(torch.zeros(EXPERTS)))
    layer.local_num_experts = layer.global_num_experts = EXPERTS
    layer.activation, layer.apply_router_weight_on_input = "silu", False
    method.create_weights(layer, torch.Generator().manual_seed(1))
    weights = layer.w1_packed.data.clone()
    method.process_weights_after_loading(layer)
    return method, layer, weights


def step(tokens, seed, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    scores = torch.rand(tokens, EXPERTS, generator=generator)
    weights, ids = scores.topk(TOP_K, dim=-1)
    return x, weights, ids.to(torch.int32)


def test_loading_leaves_the_layer_without_experts_of_its_own():
    method, layer, weights = make(5)
    assert [name for name, _ in layer.named_parameters()] == ["e_score_correction_bias"]
    assert method.cache.layer == 3
    assert set(method.cache.slots) == {"w1_packed", "w2_weight"}  # not the shapes, not the workspace
    assert all(len(slots) == 5 for slots in method.cache.slots.values())
    assert torch.equal(method.cache.store.parts["w1_packed"], 2 * weights)
    assert layer.w13_weight is method.cache.slots["w1_packed"]


@pytest.mark.parametrize("size", [1, 2, TOP_K, 7, 39])
@pytest.mark.parametrize("policy", ["lru", "slru"])
def test_a_step_is_right_at_every_size(size, policy):
    method, layer, weights = make(size, policy)
    for seed, tokens in enumerate([1, 1, 2, 9, 30, 1]):
        x, router, ids = step(tokens, seed)
        found = method.apply(layer, x, router, ids, "shared", x)
        each = torch.einsum("th,tkhd->tkd", x.double(), weights[ids.long()].double()) * router[..., None]
        bound = 2**-8 * each.abs().sum(1) * 2  # each addend and the sum are rounded to bfloat16
        assert ((found.double() - each.sum(1)).abs() <= bound).all()
        assert found.dtype == x.dtype
        # whatever the groups, the shared experts belong to the first
        calls, method.moe_kernel.calls = method.moe_kernel.calls, []
        assert [shared for _, shared in calls] == ["shared"] + [None] * (len(calls) - 1)
        assert len(calls) == -(-len(ids.unique()) // size)
        assert {slots for slots, _ in calls} == {size}


def test_a_step_that_fits_has_the_bits_of_no_cache():
    method, layer, weights = make(TOP_K)
    whole = Parameter(2 * weights, requires_grad=False)
    half = Parameter(0.5 * torch.ones(EXPERTS, 1, 1), requires_grad=False)
    for seed in range(8):
        x, router, ids = step(1, seed)
        plain = Kernel().apply(x, whole, half, router, ids, None, None, global_num_experts=EXPERTS)
        assert torch.equal(method.apply(layer, x, router, ids, None, None), plain)


def test_ids_of_nobody_need_no_expert():
    method, layer, _ = make(4)
    x, router, ids = step(2, 0)
    assert not method.apply(layer, x, router, torch.full_like(ids, -1), None, None).any()
    assert method.cache.counters().misses == 0


def test_other_slots_without_loading_again():
    method, layer, _ = make(4)
    x, router, ids = step(9, 0)
    before = method.apply(layer, x, router, ids, None, None)
    method.cache.resize(30)
    assert len(layer.w13_weight) == 30
    assert method.cache.counters().steps == 0
    after = method.apply(layer, x, router, ids, None, None)
    assert torch.allclose(before.float(), after.float(), atol=0.1)
    assert method.cache.counters().overflow_steps == 0


def test_a_method_that_is_not_known_is_refused_by_name():
    class Fp8MoEMethod(Method):
        pass

    settings = CacheSettings(moe_expert_cache_size=4)
    with pytest.raises(UsageError, match="Fp8MoEMethod"):
        with_cache(Fp8MoEMethod(), (Method,), settings, "model.layers.0.mlp.experts", None)
    fused = Method()
    fused.is_monolithic = True
    with pytest.raises(UsageError, match="--moe-backend marlin"):
        with_cache(fused, (Method,), settings, "model.layers.0.mlp.experts", None)


@pytest.mark.parametrize("backend", ["FLASHINFER_CUTLASS", "HUMMING", None])
def test_kernels_that_know_no_slots_are_refused(backend):
    method = Method()
    method.unquantized_backend = backend and SimpleNamespace(name=backend)
    with pytest.raises(UsageError, match=r"triton \(unquantized\)"):
        with_cache(
            method, (Method,), CacheSettings(moe_expert_cache_size=4), "model.layers.0.mlp.experts", None
        )


def test_layers_are_numbered_as_the_model_numbers_them():
    assert layer_number("language_model.model.layers.17.mlp.experts", 40) == 17
    assert layer_number("mtp.layers.0.mlp.experts", 40) == 40
