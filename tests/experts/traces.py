"""Small traces made of random numbers."""

import numpy as np

from evalsuite.core.geometry import Geometry
from evalsuite.experts.trace import Trace, TraceFacts


def geometry(experts=16, top_k=3, layers=2, expert_bytes=1000):
    return Geometry(
        total_bytes=500 + layers * experts * expert_bytes, dense_bytes=400, row_bytes=4, expert_bytes=expert_bytes,
        expert_layers=layers, experts=experts, top_k=top_k, kv_bytes_per_token=8, state_bytes=16,
        token_weights=100, context=64,
    )  # fmt: skip


def facts(experts=16, top_k=3, layers=(0, 1), **changes):
    values = {
        "model": "demo", "fingerprint": "f" * 64, "corpus": "builtin", "corpus_sha256": "a" * 64,
        "prompts_sha256": "b" * 64, "tokenizer": "demo", "tokenizer_sha256": "c" * 64,
        "geometry": geometry(experts, top_k, len(layers)), "layers": layers, "engine": "torch", "computed": "float32 on cpu", "input_len": 5,
        "output_len": 4, "concurrency": 1,
    }  # fmt: skip
    return TraceFacts(**(values | changes))


def trace(requests=3, seed=0, **changes):
    """`requests` prompts one after the other: one step of `input_len` tokens, then one token a step."""
    about = facts(**changes)
    rng = np.random.default_rng(seed)
    decoded = about.output_len - 1
    length = about.input_len + decoded
    steps = np.r_[np.zeros(about.input_len, int), np.arange(1, decoded + 1)]
    tokens = requests * length
    weights = rng.dirichlet(np.full(about.geometry.experts, 0.3))
    noise = rng.gumbel(size=(tokens, len(about.layers), about.geometry.experts))
    chosen = np.argsort(np.log(weights) + noise, axis=-1)[..., -about.geometry.top_k :]
    return Trace(
        about,
        request=np.repeat(np.arange(requests, dtype=np.uint32), length),
        position=np.tile(np.arange(length, dtype=np.uint32), requests),
        step=np.concatenate([steps + r * (decoded + 1) for r in range(requests)]).astype(np.uint32),
        prefill=np.tile(np.arange(length) < about.input_len, requests),
        chosen=chosen.astype(np.uint8 if about.geometry.experts <= 256 else np.uint16),
    )
