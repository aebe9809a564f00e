"""Experts drawn by Zipf's law: how often each, and what an expert cache of the real vLLM makes of it."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from vllm_cpu.install import obstacle
from vllm_cpu.tiny_moe import write_tiny_moe

from evalsuite.core.spec import Serving
from evalsuite.engines.process import ProcessGenerator
from evalsuite.engines.vllm_zipf import draw
from evalsuite.experts.policy import make_policy

MISSING = obstacle() or (None if find_spec("vllm") else "tests/vllm_cpu/install.py was not run")
EXPERTS, TOP_K, SLOTS, LAYERS, TOKENS = 16, 2, 4, 2, 400


def by_hand(exponent, tokens, top_k, seed=0):
    """One after the other without replacement, ranks by number: int [tokens, top_k]."""
    random = np.random.default_rng(seed)
    weights = np.arange(1, EXPERTS + 1) ** -exponent
    return np.array(
        [random.choice(EXPERTS, top_k, replace=False, p=weights / weights.sum()) for _ in range(tokens)]
    )


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_every_expert_comes_as_often_as_it_should(exponent):
    torch.manual_seed(1)
    tokens = 40_000
    found = draw(torch.empty(tokens, EXPERTS), TOP_K, exponent)
    assert found.shape == (tokens, TOP_K)
    assert (found[:, 0] != found[:, 1]).all()
    shares = np.bincount(found.flatten().numpy(), minlength=EXPERTS) / tokens
    expected = np.bincount(by_hand(exponent, tokens, TOP_K).flatten(), minlength=EXPERTS) / tokens
    assert np.abs(shares - expected).max() < 0.012  # five standard deviations of a difference of two shares
    first = np.bincount(draw(torch.empty(tokens, EXPERTS), 1, exponent)[:, 0].numpy(), minlength=EXPERTS)
    weights = np.arange(1, EXPERTS + 1) ** -exponent
    assert np.abs(first / tokens - weights / weights.sum()).max() < 0.0125


@pytest.mark.slow
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_a_cache_hits_as_often_as_its_policy_on_such_a_trace(tmp_path, monkeypatch):
    for name, value in {
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    folder = write_tiny_moe(tmp_path / "moe", int4=True, experts=EXPERTS, top_k=TOP_K, layers=LAYERS)
    serving = Serving(
        engine="vllm",
        enforce_eager=True,
        max_model_len=512,
        moe_routing="zipf:1.5",
        moe_expert_cache_size=SLOTS,
    )
    engine = ProcessGenerator(str(folder), serving, tmp_path / "log", load_timeout_s=200)
    try:
        engine.start()
        engine.reset_counters()
        engine.generate([np.arange(2)], TOKENS, lambda: None)
        counters = engine.expert_cache()
    finally:
        engine.close()

    policy, steps = make_policy("lru", SLOTS, EXPERTS), 20_000
    hits = sum(
        placed.hits for step in by_hand(1.5, steps, TOP_K).tolist() for placed in policy.serve(sorted(step))
    )
    expected = hits / (steps * TOP_K)
    assert [layer.steps for layer in counters.layers] == [TOKENS] * LAYERS
    assert counters.hits + counters.misses == pytest.approx(TOKENS * LAYERS * TOP_K, abs=3 * LAYERS)
    assert counters.hit_rate == pytest.approx(expected, abs=0.06)
    assert expected > SLOTS / EXPERTS + 0.3  # what uniform routing would give
