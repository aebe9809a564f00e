"""The small files beside the weights: configuration, tokenizer, and what vLLM's loaders insist on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evalsuite import __version__
from evalsuite.quant.checkpoint import INDEX
from evalsuite.quant.hlwq import scaled_levels
from evalsuite.quant.plan import Plan
from evalsuite.quant.recipe import Recipe
from evalsuite.quant.rules import Family

COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
RECIPE_FILE = "quantization_recipe.json"
QWEN_TOKENIZERS = ("Qwen2Tokenizer", "Qwen2TokenizerFast")


def small_files(
    folder: Path, config: Mapping[str, Any], rules: Family, plan: Plan, recipe: Recipe
) -> dict[str, bytes]:
    """Every file of the result except its weights and their index, by name."""
    found = {path.name: path for pattern in COPIED for path in folder.glob(pattern) if path.is_file()}
    files = {name: path.read_bytes() for name, path in sorted(found.items()) if name != INDEX}
    files["config.json"] = _json(dict(config) | _quantization(plan, recipe))
    files[RECIPE_FILE] = _json(
        {"made_by": f"hlwq-eval {__version__}", "source": folder.resolve().name, "recipe": recipe.as_dict()}
    )
    if rules.multimodal:
        files |= _for_qwen3_vl(config, files)
    return files


def _quantization(plan: Plan, recipe: Recipe) -> dict[str, Any]:
    if recipe.format == "bf16":
        return {}
    if recipe.format == "hlwq" and recipe.scheme:
        return {
            "quantization_config": {
                "quant_method": "hlwq",
                "bits": recipe.scheme.bits,
                "block": recipe.scheme.block,
                "codebook": recipe.scheme.codebook,
                "hadamard": recipe.scheme.hadamard,
                "levels": list(scaled_levels(recipe.scheme)),
            }
        }
    # https://github.com/vllm-project/compressed-tensors; vLLM reads the format of experts from the group.
    weights = {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": recipe.group_size,
        "dynamic": False, "actorder": None, "block_structure": None, "observer": "minmax",
        "observer_kwargs": {},
    }  # fmt: skip
    group = {
        "targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None,
        "format": "pack-quantized",
    }  # fmt: skip
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(plan.ignore),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }
    }


def _for_qwen3_vl(config: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Stubs for a multimodal architecture, of which only the text is used.

    vLLM runs Qwen3.5 through the processor of Qwen3-VL, which reads an image processor's settings and accepts
    Qwen2 tokenizers only, even when no image is ever given.
    """
    stubs: dict[str, bytes] = {}
    if "preprocessor_config.json" not in files:
        vision = config.get("vision_config") or {}
        stubs["preprocessor_config.json"] = _json(
            {
                "image_processor_type": "Qwen2VLImageProcessor",
                "processor_class": "Qwen3VLProcessor",
                "size": {"shortest_edge": 65536, "longest_edge": 16777216},
                "patch_size": vision.get("patch_size", 16),
                "temporal_patch_size": vision.get("temporal_patch_size", 2),
                "merge_size": vision.get("spatial_merge_size", 2),
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
            }
        )
    if "tokenizer_config.json" in files:
        tokenizer = json.loads(files["tokenizer_config.json"])
        if tokenizer.get("tokenizer_class") not in QWEN_TOKENIZERS:
            stubs["tokenizer_config.json"] = _json(tokenizer | {"tokenizer_class": "Qwen2TokenizerFast"})
    return stubs


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
