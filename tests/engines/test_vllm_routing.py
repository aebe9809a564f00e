"""vLLM's recorded choices against the torch engine's, on the same weights in float32."""

from importlib.util import find_spec

import numpy as np
import pytest
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from vllm_cpu.install import obstacle

from engines import tiny
from evalsuite.core.errors import UsageError
from evalsuite.data.models import find_checkpoint
from evalsuite.engines.torch_routing import TorchRouting
from evalsuite.engines.vllm_routing import VllmRouting

MISSING = obstacle() or (None if find_spec("vllm") else "tests/vllm_cpu/install.py was not run")
INPUT, OUTPUT = 12, 4


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


@pytest.fixture
def environment(monkeypatch):
    """What vLLM needs on a CPU, for the child to inherit."""
    for name, value in {
        "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)


def vllm_recorder(folder, log, **changes):
    options = {
        "dtype": "float32", "load_format": "auto", "tokens": INPUT + OUTPUT, "concurrency": 1,
        "trust_remote_code": False, "log": log,
    }  # fmt: skip
    return VllmRouting(find_checkpoint(str(folder)), **options | changes)


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.usefixtures("environment")
def test_same_choices_as_the_torch_engine(tmp_path, capfd):
    folder = tiny.write(qwen3_moe(), tmp_path / "moe")
    capfd.readouterr()
    prompts = np.random.default_rng(0).integers(0, 256, (2, INPUT))
    recorder = vllm_recorder(folder, tmp_path / "engine.log")
    found = [one for n in range(2) for one in recorder.record([prompts[n]], OUTPUT, n)]
    recorder.close()
    assert recorder.name.startswith("vllm 0.")
    assert recorder.computed == "float32 on cpu"
    assert "vllm" in (tmp_path / "engine.log").read_text()
    assert capfd.readouterr().out == ""  # standard output is for results
    torch_engine = TorchRouting(
        find_checkpoint(str(folder)), device="cpu", dtype="float32", trust_remote_code=False
    )
    expected = [one for n in range(2) for one in torch_engine.record([prompts[n]], OUTPUT, n)]
    assert recorder.layers == torch_engine.layers == (0, 1)
    assert len(found) == len(expected) == 2 * OUTPUT
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.prefill == theirs.prefill
        assert mine.request.tolist() == theirs.request.tolist()
        assert mine.position.tolist() == theirs.position.tolist()
        np.testing.assert_array_equal(np.sort(mine.chosen), np.sort(theirs.chosen))


def test_several_requests_at_once_are_refused_before_anything_loads(tmp_path):
    with pytest.raises(UsageError, match="one request at a time"):
        vllm_recorder("demo", tmp_path / "engine.log", concurrency=2)
    assert not (tmp_path / "engine.log").exists()
