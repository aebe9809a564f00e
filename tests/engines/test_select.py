"""Which engine a request gets, and why."""

import json

import pytest

from evalsuite.core.errors import MissingDependency, UsageError
from evalsuite.core.record import Gpu
from evalsuite.core.spec import Serving
from evalsuite.data.models import find_checkpoint
from evalsuite.engines import select, vllm_arguments
from evalsuite.engines.select import choose_engine, open_generator

MOE = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 257}


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "moe"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(MOE))
    return place


@pytest.fixture
def whole(folder):
    (folder / "model.safetensors").touch()
    return find_checkpoint(str(folder))


@pytest.fixture
def installed(monkeypatch):
    """vLLM of this version on a machine with so many GPUs, or none."""

    def make(version, gpus=1):
        fields = {
            "model", "dtype", "tensor_parallel_size", "enforce_eager", "skip_tokenizer_init", "seed",
            "enable_prefix_caching", "trust_remote_code", "worker_extension_cls", "load_format",
            "language_model_only",
        }  # fmt: skip
        listed = tuple(Gpu(name="NVIDIA H100", memory_bytes=80 << 30) for _ in range(gpus))
        for module in (select, vllm_arguments):
            monkeypatch.setattr(module, "vllm_installed", lambda: version)
            monkeypatch.setattr(module, "find_spec", lambda _: object() if version else None)
        monkeypatch.setattr(vllm_arguments, "engine_fields", lambda: frozenset(fields))
        monkeypatch.setattr(vllm_arguments, "read_gpus", lambda: (listed, "580", "13.0"))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return make


@pytest.mark.parametrize(
    ("version", "gpus", "serving", "engine", "why"),
    [
        ("0.26.0", 1, {}, "vllm", "0.26.0 is installed"),
        (None, 1, {}, "torch", "not installed"),
        ("0.32.0+cpu", 0, {}, "torch", "built for the CPU"),
        ("0.26.0", 0, {}, "torch", "there is none"),
        ("0.99.0", 1, {"moe_expert_cache_size": 4}, "torch", "does not know vLLM"),
        ("0.26.0", 1, {"engine": "vllm"}, "vllm", "asked for"),
        ("0.32.0+cpu", 0, {"engine": "vllm"}, "vllm", "asked for"),
        ("0.26.0", 1, {"engine": "server"}, "server", "asked for"),
        ("0.26.0", 1, {"engine": "torch"}, "torch", "asked for"),
        (None, 0, {"server_url": "http://x"}, "server", "URL"),
        (None, 0, {"server_url": "http://x", "engine": "server"}, "server", "URL"),
    ],
)
def test_choice(installed, whole, version, gpus, serving, engine, why):
    installed(version, gpus)
    found, reason = choose_engine(Serving(**serving), whole)
    assert found == engine
    assert why in reason


@pytest.mark.parametrize(
    ("version", "serving", "error", "named"),
    [
        (None, {"engine": "vllm"}, MissingDependency, "vLLM is not installed"),
        (None, {"engine": "server"}, MissingDependency, "vLLM is not installed"),
        ("0.99.0", {"engine": "vllm", "moe_expert_cache_size": 4}, UsageError, "does not know vLLM"),
        ("0.26.0", {"engine": "vllm", "gpus": (3,)}, UsageError, "no GPU 3"),
        ("0.26.0", {"engine": "torch", "server_url": "http://x"}, UsageError, "uses no server"),
    ],
)
def test_what_was_asked_for_by_name_is_not_replaced(installed, whole, version, serving, error, named):
    installed(version)
    with pytest.raises(error, match=named):
        choose_engine(Serving(**serving), whole)


@pytest.mark.parametrize("version", [None, "0.32.0+cpu"])
def test_dummy_weights_need_vllm(installed, folder, version):
    installed(version, 0)
    with pytest.raises(UsageError, match="Dummy weights need vLLM"):
        open_generator(str(folder), Serving(load_format="dummy"), folder / "log")
    installed("0.26.0")
    checkpoint = find_checkpoint(str(folder), weights=False)
    assert choose_engine(Serving(load_format="dummy"), checkpoint)[0] == "vllm"
