"""Tiny random mixture-of-experts checkpoints, written without any model library.

BF16 or compressed-tensors INT4 in the shape of Qwen3-MoE, or BF16 with a shared expert in that of Qwen2-MoE.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

GROUP = 32


def write_tiny_moe(
    folder: Path, *, int4: bool, shared: bool = False, experts: int = 16, top_k: int = 2, hidden: int = 64, intermediate: int = 32,
    layers: int = 2, vocabulary: int = 257, group: int = GROUP, seed: int = 3,
) -> Path:  # fmt: skip
    """A checkpoint folder that vLLM loads; the same seed gives the same weights."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 0.2) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(torch.bfloat16)

    tensors: dict[str, Tensor] = {
        "model.embed_tokens.weight": normal(vocabulary, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "lm_head.weight": normal(vocabulary, hidden),
    }
    heads, head_dim = 2, hidden // 2
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        for name, rows in (("q", heads), ("k", 1), ("v", 1)):
            tensors[f"{at}self_attn.{name}_proj.weight"] = normal(rows * head_dim, hidden)
            if shared:
                tensors[f"{at}self_attn.{name}_proj.bias"] = normal(rows * head_dim)
        tensors[f"{at}self_attn.o_proj.weight"] = normal(hidden, heads * head_dim)
        for name in () if shared else ("q_norm", "k_norm"):
            tensors[f"{at}self_attn.{name}.weight"] = torch.ones(head_dim, dtype=torch.bfloat16)
        tensors[f"{at}mlp.gate.weight"] = normal(experts, hidden)
        if shared:
            tensors[f"{at}mlp.shared_expert_gate.weight"] = normal(1, hidden)
            for name, rows, columns in (
                ("gate", intermediate, hidden), ("up", intermediate, hidden), ("down", hidden, intermediate),
            ):  # fmt: skip
                tensors[f"{at}mlp.shared_expert.{name}_proj.weight"] = normal(rows, columns)
        for expert in range(experts):
            for name, rows, columns in (
                ("gate", intermediate, hidden), ("up", intermediate, hidden), ("down", hidden, intermediate),
            ):  # fmt: skip
                key = f"{at}mlp.experts.{expert}.{name}_proj.weight"
                if not int4:
                    tensors[key] = normal(rows, columns)
                    continue
                tensors[f"{key}_packed"] = torch.randint(
                    -(2**31), 2**31, (rows, columns // 8), generator=generator, dtype=torch.int32
                )
                scale = torch.rand((rows, columns // group), generator=generator) * 0.05 + 0.02
                tensors[f"{key}_scale"] = scale.to(torch.bfloat16)
                tensors[f"{key}_shape"] = torch.tensor([rows, columns])
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "torch_dtype": "bfloat16",
        "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": intermediate,
        "moe_intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 1, "head_dim": head_dim, "num_experts": experts,
        "num_experts_per_tok": top_k, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if shared:
        config |= {
            "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe",
            "shared_expert_intermediate_size": intermediate, "norm_topk_prob": False,
        }  # fmt: skip
    if int4:
        weights = {
            "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group,
            "dynamic": False, "observer": "minmax", "actorder": None,
        }  # fmt: skip
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder
