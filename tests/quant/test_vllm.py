"""The real vLLM, on the CPU, on checkpoints that the quantizer wrote."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from vllm_cpu.install import conflicts, obstacle

from evalsuite.data.models import Checkpoint
from evalsuite.data.windows import TokenWindow
from evalsuite.engines.torch import TorchScorer
from evalsuite.quant.pipeline import quantize
from evalsuite.quant.recipe import Recipe

MISSING = obstacle() or (None if find_spec("vllm") else "tests/vllm_cpu/install.py was not run")
PROGRAM = Path(__file__).resolve().parents[1] / "vllm_cpu" / "score.py"
TOKENS = [7 * i % 64 for i in range(48)]
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip
NO_KERNEL = "has no attribute 'cpu_gemm_wna16'"


def has_avx512():
    info = Path("/proc/cpuinfo")
    return not info.is_file() or "avx512f" in info.read_text()


def test_installing_vllm_changes_no_pinned_version():
    assert conflicts() == []


@pytest.mark.slow
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.parametrize(("family", "method"), [("llama", "rtn"), ("llama", "hlwq"), ("qwen3_moe", "hlwq")])
def test_int4_runs_and_agrees_with_the_torch_engine(checkpoints, family, method, tmp_path):
    out = tmp_path / "int4"
    quantize(checkpoints[family], out, Recipe(method=method), device="cpu")
    command = [sys.executable, str(PROGRAM), str(out), json.dumps(TOKENS), str(tmp_path / "logprobs")]
    run = subprocess.run(
        command, env=os.environ | ENVIRONMENT, check=False, capture_output=True, text=True, timeout=300
    )
    if not has_avx512() and NO_KERNEL in run.stderr:
        pytest.skip("vLLM's library for CPUs without AVX-512 has no INT4 products")
    assert run.returncode == 0, run.stderr[-3000:]
    served = np.array(json.loads((tmp_path / "logprobs").read_text()))

    exact = logprobs(out, "float32")
    rounding = np.abs(logprobs(out, "bfloat16") - exact).mean()
    distance = np.abs(served - exact).mean()
    unquantized = np.abs(served - logprobs(checkpoints[family], "float32")).mean()
    assert distance < 2 * rounding  # bfloat16 too, its sums in another order
    assert distance < 0.1 * unquantized


def logprobs(folder, dtype):
    """Of each token after the first, by the torch engine."""
    scorer = TorchScorer(Checkpoint(folder.name, folder), device="cpu", dtype=dtype)
    try:
        (score,) = scorer.score([TokenWindow(0, np.array(TOKENS), 1)])
    finally:
        scorer.close()
    return -score.nats
