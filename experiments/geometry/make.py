"""Writes the geometry of the 35B model as folders with a configuration and no weights: make.py [FOLDER].

The numbers are those of Qwen3.5-35B-A3B (https://huggingface.co/Qwen/Qwen3.5-35B-A3B), which transformers has
as the defaults of `Qwen3_5MoeConfig`; the INT4 folder quantizes exactly what `hlwq-eval quantize` would.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import Qwen3_5MoeConfig

from evalsuite.quant.plan import plan_geometry
from evalsuite.quant.recipe import Recipe
from evalsuite.quant.rules import family
from evalsuite.quant.sidecar import RECIPE_FILE, small_files

NAME = "qwen3.5-35b-a3b"
# what transformers' defaults leave open or have otherwise
TEXT = {
    "dtype": "bfloat16", "max_position_embeddings": 262144, "mamba_ssm_dtype": "float32",
    "eos_token_id": 248044, "pad_token_id": 248044,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10_000_000, "partial_rotary_factor": 0.25,
        "mrope_interleaved": True, "mrope_section": [11, 11, 10],
    },
}  # fmt: skip


def configuration() -> dict[str, Any]:
    config = Qwen3_5MoeConfig(architectures=["Qwen3_5MoeForConditionalGeneration"], dtype="bfloat16")
    text = config.to_dict()["text_config"]
    return json.loads(config.to_json_string(use_diff=False)) | {"text_config": text | TEXT}


def main(root: Path) -> None:
    config = configuration()
    rules, recipe = family(config), Recipe(method="rtn")
    plan = plan_geometry(Qwen3_5MoeConfig.from_dict(config).get_text_config(), rules, recipe)
    with tempfile.TemporaryDirectory() as empty:
        files = small_files(Path(empty), config, rules, plan, recipe)
    files.pop(RECIPE_FILE)
    plain = files | {"config.json": json.dumps(config, indent=2).encode() + b"\n"}
    for suffix, contents in (("int4", files), ("bf16", plain)):
        folder = root / f"{NAME}-{suffix}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in contents.items():
            (folder / name).write_bytes(data)
    print(f"{plan.bytes_before / 1e9:.2f} GB in BF16, {plan.bytes_after / 1e9:.2f} GB in INT4")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
