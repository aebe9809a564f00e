"""Which engine scores, and what it refuses before anything loads."""

import json

import pytest

from engines import tiny
from evalsuite.core.errors import MissingDependency, ModelError, UsageError
from evalsuite.core.protocol import protocol
from evalsuite.core.spec import PerplexitySpec
from evalsuite.data.models import Checkpoint, find_checkpoint
from evalsuite.engines import scorers, vllm_arguments
from evalsuite.engines.scorers import check_scorer, choose_scorer, serving_of


def spec(**changes):
    options = {"model": "demo", "corpus": "builtin", "protocol": protocol("card-1155")}
    return PerplexitySpec(**options | changes)


@pytest.fixture
def _vllm(monkeypatch):
    """A vLLM built for the CPU, or what stands in for it."""
    monkeypatch.setattr(vllm_arguments, "vllm_installed", lambda: "0.32.0+cpu")
    monkeypatch.setattr(scorers, "vllm_installed", lambda: "0.32.0+cpu")
    monkeypatch.setattr(vllm_arguments, "find_spec", lambda name: object())
    monkeypatch.setattr(scorers, "engine_arguments", lambda checkpoint, serving: {})


@pytest.fixture
def _no_vllm(monkeypatch):
    monkeypatch.setattr(vllm_arguments, "vllm_installed", lambda: None)
    monkeypatch.setattr(scorers, "vllm_installed", lambda: None)


def changed(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return Checkpoint("changed", folder)


UNREADABLE = [
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quant_method is 'awq'"),
    ({"model_type": "of_tomorrow"}, "of_tomorrow"),
]


class TestAuto:
    @pytest.mark.usefixtures("_vllm")
    def test_takes_torch_for_what_torch_reads(self, demo_folder):
        choice = choose_scorer(spec(), find_checkpoint("demo"))
        assert choice.engine == choice.identity["engine"] == "torch"
        assert "reference" in choice.why

    @pytest.mark.usefixtures("_vllm")
    @pytest.mark.parametrize(("changes", "said"), UNREADABLE)
    def test_takes_vllm_for_what_torch_cannot_read(self, llama_folder, changes, said):
        choice = choose_scorer(spec(), changed(llama_folder, **changes))
        assert choice.engine == choice.identity["engine"] == "vllm"
        assert choice.identity["vllm"] == "0.32.0+cpu"
        assert said in choice.why

    @pytest.mark.usefixtures("_no_vllm")
    @pytest.mark.parametrize(("changes", "said"), UNREADABLE)
    def test_without_vllm_says_what_torch_cannot_read(self, llama_folder, changes, said):
        with pytest.raises(ModelError, match="vllm") as refusal:
            choose_scorer(spec(), changed(llama_folder, **changes))
        assert said in str(refusal.value)

    @pytest.mark.usefixtures("_vllm")
    def test_takes_vllm_for_several_devices(self):
        choice = choose_scorer(spec(tensor_parallel_size=2), find_checkpoint("demo"))
        assert choice.engine == "vllm"
        assert "several" in choice.why


@pytest.mark.usefixtures("_vllm")
def test_identity_tells_engines_apart():
    found = [choose_scorer(spec(engine=name), find_checkpoint("demo")).identity for name in ("torch", "vllm")]
    assert found[0]["engine"] == "torch"
    assert found[1]["engine"] == "vllm"
    assert "vllm" in found[1]
    assert "transformers" in found[0]


@pytest.mark.usefixtures("_vllm")
def test_the_spec_reaches_the_serving():
    serving = serving_of(
        spec(
            engine="vllm", dtype="bfloat16", additional_config={"a": 1}, moe_expert_cache_size=4,
            gpu_memory_utilization=0.3,
        )
    )  # fmt: skip
    assert serving.enforce_eager
    assert serving.load_format == "auto"
    assert (serving.dtype, serving.additional_config, serving.moe_expert_cache_size) == (
        "bfloat16", {"a": 1}, 4
    )  # fmt: skip
    assert serving.gpu_memory_utilization == 0.3


@pytest.mark.usefixtures("_vllm")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"engine": "server"}, "no hidden states"),
        ({"server_url": "http://127.0.0.1:1"}, "no hidden states"),
        ({"engine": "torch", "tensor_parallel_size": 2}, "scores on one device"),
        ({"engine": "torch", "additional_config": {"a": 1}}, "--additional-config is vLLM's"),
        ({"engine": "torch", "gpu_memory_utilization": 0.3}, "--gpu-memory-utilization is vLLM's"),
    ],
)
def test_refused_before_the_model_is_looked_for(changes, said):
    with pytest.raises(UsageError, match=said):
        check_scorer(spec(**changes))


@pytest.mark.usefixtures("_vllm")
def test_a_flag_of_vllms_is_refused_where_auto_takes_torch():
    with pytest.raises(UsageError, match="--additional-config"):
        choose_scorer(spec(additional_config={"a": 1}), find_checkpoint("demo"))


@pytest.mark.usefixtures("_vllm")
def test_a_vllm_of_the_wrong_kind(monkeypatch):
    monkeypatch.setattr("evalsuite.engines.compute.resolve_compute", lambda device, dtype: None)
    with pytest.raises(UsageError, match="cannot compute on cuda:0"):
        check_scorer(spec(engine="vllm", device="cuda:0"))
    monkeypatch.setattr(scorers, "built_for_cpu", lambda: False)
    with pytest.raises(UsageError, match="cannot compute on cpu"):
        check_scorer(spec(engine="vllm", device="cpu"))
    with pytest.raises(UsageError, match="names one GPU"):
        check_scorer(spec(engine="vllm", device="cuda:0", tensor_parallel_size=2))


@pytest.mark.usefixtures("_no_vllm")
def test_vllm_is_missing():
    with pytest.raises(MissingDependency, match="pip install"):
        check_scorer(spec(engine="vllm"))


def test_geometry_without_weights_is_no_model_to_score(tmp_path):
    folder = tiny.write(tiny.llama(), tmp_path / "geometry")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="--load-format dummy"):
        find_checkpoint(str(folder))
