"""vLLM's recorded choices against the torch engine's, on the same weights in float32."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from vllm_cpu.install import obstacle

from engines import tiny
from evalsuite.core.errors import UsageError
from evalsuite.data.models import find_checkpoint
from evalsuite.engines.torch_routing import TorchRouting
from evalsuite.engines.vllm_routing import VllmRouting

ROOT = Path(__file__).resolve().parents[2]
MISSING = obstacle() or (None if find_spec("vllm") else "tests/vllm_cpu/install.py was not run")
INPUT, OUTPUT = 12, 4
PROGRAM = """
import json, sys
import numpy as np
from evalsuite.data.models import find_checkpoint
from evalsuite.engines.vllm_routing import VllmRouting

if __name__ == "__main__":
    recorder = VllmRouting(find_checkpoint(sys.argv[1]), dtype="float32", load_format="auto", tokens=16,
                           concurrency=1, trust_remote_code=False)
    found = [[one.prefill, one.request.tolist(), one.position.tolist(), one.chosen.tolist()]
             for number, prompt in enumerate(json.loads(sys.argv[2]))
             for one in recorder.record([np.array(prompt)], 4, number)]
    open(sys.argv[3], "w").write(json.dumps({"layers": recorder.layers, "name": recorder.name,
                                             "computed": recorder.computed, "passes": found}))
"""


def qwen3_moe():
    import torch

    torch.manual_seed(3)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=tiny.VOCABULARY, hidden_size=64, intermediate_size=64, moe_intermediate_size=32,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts=16,
            num_experts_per_tok=4, max_position_embeddings=128, initializer_range=0.2, tie_word_embeddings=False,
            norm_topk_prob=True,
        )
    )  # fmt: skip


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_same_choices_as_the_torch_engine(tmp_path):
    folder = tiny.write(qwen3_moe(), tmp_path / "moe")
    prompts = np.random.default_rng(0).integers(0, 256, (2, INPUT))
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, program, folder, json.dumps(prompts.tolist()), out], cwd=tmp_path, env=environment,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    torch_engine = TorchRouting(
        find_checkpoint(str(folder)), device="cpu", dtype="float32", trust_remote_code=False
    )
    expected = [one for n in range(2) for one in torch_engine.record([prompts[n]], OUTPUT, n)]
    assert tuple(found["layers"]) == torch_engine.layers == (0, 1)
    assert found["name"].startswith("vllm 0.")
    assert found["computed"] == "float32 on cpu"
    assert len(found["passes"]) == len(expected) == 2 * OUTPUT
    for (prefill, request, position, chosen), one in zip(found["passes"], expected, strict=True):
        assert (prefill, request, position) == (one.prefill, one.request.tolist(), one.position.tolist())
        np.testing.assert_array_equal(np.sort(chosen), np.sort(one.chosen))


def test_several_requests_at_once_are_refused_before_anything_loads(demo_folder):
    with pytest.raises(UsageError, match="one request at a time"):
        VllmRouting(
            find_checkpoint("demo"), dtype="auto", load_format="auto", tokens=8, concurrency=2,
            trust_remote_code=False,
        )  # fmt: skip
