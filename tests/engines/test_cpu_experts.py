"""Expert layers in rounded-up shapes against transformers' own."""

import pytest
import torch

from engines import tiny
from evalsuite.engines import cpu_experts


@pytest.fixture
def layer():
    model = tiny.qwen3_5_moe()
    return model.model.layers[0].mlp.experts


def run(layer, name, *inputs):
    layer.config._experts_implementation = name
    with torch.inference_mode():
        return layer(*inputs)


def routed(tokens, k, choose):
    torch.manual_seed(7)
    weights = torch.rand(tokens, k)
    return torch.randn(tokens, 32), choose(tokens, k), weights / weights.sum(-1, keepdim=True)


ROUTINGS = {
    "spread": lambda n, k: torch.stack([torch.randperm(16)[:k] for _ in range(n)]),
    "one expert has no token": lambda n, k: torch.stack([torch.randperm(15)[:k] for _ in range(n)]),
    "two experts have all": lambda n, k: torch.tensor([[15, 3]]).repeat(n, 1),
    "the last alone and the first": lambda n, k: torch.tensor([[0, 15]]).repeat(n, 1),
}


@pytest.mark.parametrize("other", ["eager", "grouped_mm"])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 500])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_same_as_transformers(layer, routing, tokens, other):
    inputs = routed(tokens, 2, ROUTINGS[routing])
    expected = run(layer, other, *inputs)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(run(layer, cpu_experts.NAME, *inputs), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("tokens", [3, 200])
def test_in_bfloat16(layer, tokens):
    layer.bfloat16()
    hidden, index, weights = routed(tokens, 2, ROUTINGS["spread"])
    inputs = hidden.bfloat16(), index, weights.bfloat16()
    found = run(layer, cpu_experts.NAME, *inputs)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, run(layer, "eager", *inputs), rtol=0.05, atol=0.02)


def test_whole_models_agree_and_say_so():
    model = tiny.qwen3_5_moe().eval()
    ids = torch.arange(120)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        assert cpu_experts.use_on(model) == 2
        found = model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_dense_models_are_left_alone():
    model = tiny.llama()
    assert cpu_experts.use_on(model) == 0
