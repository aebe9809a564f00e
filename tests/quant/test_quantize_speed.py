"""The benchmark's extrapolation rests on a list of shapes; it is the list that the architecture has."""

import runpy
from pathlib import Path

from transformers import Qwen3_5MoeTextConfig

from evalsuite.quant.plan import plan_geometry
from evalsuite.quant.recipe import Recipe
from evalsuite.quant.rules import FAMILIES

SCRIPT = Path(__file__).parents[2] / "experiments" / "benchmarks" / "quantize_speed.py"


def test_shapes_of_the_whole_model():
    listed = runpy.run_path(str(SCRIPT))["quantized_tensors"]()
    plan = plan_geometry(Qwen3_5MoeTextConfig(), FAMILIES["qwen3_5_moe_text"], Recipe())
    assert set(listed) == {tensor.source for tensor in plan.tensors if tensor.fate == "quantized"}
