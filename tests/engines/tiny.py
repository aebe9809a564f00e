"""Tiny random models that run through the whole suite: 257 byte-level tokens, like the built-in model's."""

import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from evalsuite.data.models import find_checkpoint
from evalsuite.data.tokens import TokenStream
from evalsuite.data.windows import cut
from evalsuite.engines.torch import TorchScorer

DEMO = Path(__file__).resolve().parents[2] / "evalsuite" / "demo"
VOCABULARY = 257
BOS = 256


def llama(**changes):
    torch.manual_seed(1)
    options = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
        "tie_word_embeddings": False, "initializer_range": 0.2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**options | changes))


def qwen3_5_moe(**changes):
    torch.manual_seed(2)
    options = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
        "num_experts": 16, "num_experts_per_tok": 2, "max_position_embeddings": 512,
        "initializer_range": 0.2,
    }  # fmt: skip
    return Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**options | changes))


def qwen3_moe(**changes):
    torch.manual_seed(3)
    options = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "moe_intermediate_size": 16,
        "num_experts": 16, "num_experts_per_tok": 2, "norm_topk_prob": True,
        "max_position_embeddings": 512, "initializer_range": 0.2,
    }  # fmt: skip
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**options | changes))


def write(model, folder, dtype=torch.float32):
    """A checkpoint as users have them, with the built-in model's tokenizer."""
    model.to(dtype).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder / name)
    return folder


@contextmanager
def scorer(folder, **options):
    """A `TorchScorer` on the CPU in float32, closed in the end."""
    options = {"device": "cpu", "dtype": "float32"} | options
    loaded = TorchScorer(find_checkpoint(str(folder)), **options)
    try:
        yield loaded
    finally:
        loaded.close()


def random_stream(tokens, vocabulary=VOCABULARY, window_bos=None):
    ids = np.random.default_rng(5).integers(0, vocabulary, tokens)
    return TokenStream(ids, np.ones(tokens, np.int64), np.ones(tokens, np.int64), window_bos)


def scores_of(loaded, stream, windows, batch):
    """Nats of each window, scored `batch` windows at a time."""
    tokens = list(cut(stream, list(windows)))
    scores = [s for i in range(0, len(tokens), batch) for s in loaded.score(tokens[i : i + batch])]
    assert [score.index for score in scores] == [window.index for window in windows]
    return [score.nats for score in scores]
