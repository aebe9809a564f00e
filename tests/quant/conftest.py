"""Tiny random checkpoints, written by transformers as it writes real ones."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from quant.files import load_state

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
QWEN3_5_MOE = {
    "vocab_size": 64, "hidden_size": 128, "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"], **ATTENTION,
    "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128,
    "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "out_hidden_size": 128,
    "num_position_embeddings": 16,
}  # fmt: skip


def _models():
    yield "llama", lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=256, intermediate_size=384, num_hidden_layers=3, **ATTENTION,
            tie_word_embeddings=True, initializer_range=0.1,
        )
    )  # fmt: skip
    yield "qwen3_moe", lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=2, **ATTENTION,
            moe_intermediate_size=128, num_experts=4, num_experts_per_tok=2,
        )
    )  # fmt: skip
    yield "qwen3_5_moe_text", lambda: Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**QWEN3_5_MOE))
    yield (
        "qwen3_5_moe",
        lambda: Qwen3_5MoeForConditionalGeneration(
            Qwen3_5MoeConfig(text_config=QWEN3_5_MOE, vision_config=VISION)
        ),
    )


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folders of tiny checkpoints in BF16, by model type, several shards each."""
    root = tmp_path_factory.mktemp("checkpoints")
    folders = {}
    for name, build in _models():
        torch.manual_seed(0)
        folder = root / name
        build().to(torch.bfloat16).save_pretrained(folder, max_shard_size="300KB")
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
        (folder / "README.md").write_text("not copied")
        folders[name] = folder
    return folders


@pytest.fixture(scope="session")
def llama(checkpoints):
    return checkpoints["llama"]


@pytest.fixture
def copy_of(tmp_path):
    """A copy of a checkpoint that a test may spoil."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / f"copy-of-{folder.name}"))

    return copy


@pytest.fixture(scope="session")
def stacked(checkpoints, tmp_path_factory):
    """The Qwen3.5-MoE with each layer's experts in two 3-D tensors, as Qwen publishes them; one file."""
    source = checkpoints["qwen3_5_moe"]
    folder = tmp_path_factory.mktemp("stacked") / "stacked"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    state = load_state(source)
    for layer in range(QWEN3_5_MOE["num_hidden_layers"]):
        prefix = f"model.language_model.layers.{layer}.mlp.experts"
        experts = range(QWEN3_5_MOE["num_experts"])
        projections = {
            name: torch.stack([state.pop(f"{prefix}.{e}.{name}.weight") for e in experts])
            for name in ("gate_proj", "up_proj", "down_proj")
        }
        state[f"{prefix}.gate_up_proj"] = torch.cat([projections["gate_proj"], projections["up_proj"]], dim=1)
        state[f"{prefix}.down_proj"] = projections["down_proj"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
