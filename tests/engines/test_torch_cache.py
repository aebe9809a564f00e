"""Experts served from slots: nats as without a cache, and counts as the policy alone would have them."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import grouped_mm_experts_forward

from engines import tiny
from evalsuite.core.errors import ModelError, UsageError
from evalsuite.data.models import find_checkpoint
from evalsuite.data.windows import TokenWindow
from evalsuite.engines import torch_cache
from evalsuite.engines.cpu_experts import expert_modules
from evalsuite.engines.expert_weights import modules_by_layer, shape_of
from evalsuite.engines.loading import load_model
from evalsuite.engines.torch_cache import Caching
from evalsuite.experts.policy import POLICIES, make_policy
from evalsuite.quant.pipeline import quantize
from evalsuite.quant.recipe import Recipe

CPU = torch.device("cpu")
SIZES = [1, 2, 8, 64, 1000, None]


def qwen3_moe():
    torch.manual_seed(3)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
            num_attention_heads=2, num_key_value_heads=1, head_dim=16, moe_intermediate_size=24,
            num_experts=12, num_experts_per_tok=3, decoder_sparse_step=1, mlp_only_layers=[1],
            initializer_range=0.2,
        )
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HLWQ_EVAL_CACHE", str(tmp_path / "experts"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, demo_folder):
    root = tmp_path_factory.mktemp("models")
    return {
        "demo": demo_folder,
        "qwen3_moe": tiny.write(qwen3_moe(), root / "qwen3_moe"),
        "qwen3_5_moe": tiny.write(tiny.qwen3_5_moe(), root / "qwen3_5_moe"),
    }


MODELS = ["demo", "qwen3_moe", "qwen3_5_moe"]


@pytest.fixture(params=MODELS)
def folder(request, folders):
    return folders[request.param]


def windows(count=3, length=90, vocabulary=256):
    ids = np.random.default_rng(1).integers(0, vocabulary, (count, length))
    return [TokenWindow(i, row, length // 2) for i, row in enumerate(ids)]


def nats(scorer, scored):
    return np.concatenate([score.nats for score in scorer.score(scored)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nats_are_the_same_bit_for_bit_at_every_size(folder, dtype):
    scored = windows()
    with tiny.scorer(folder, dtype=dtype) as plain:
        expected, parameters = nats(plain, scored), plain.facts.parameters
        assert plain.expert_cache() is None
    with tiny.scorer(folder, dtype=dtype, caching=Caching(1)) as cached:
        assert cached.facts.parameters == parameters
        for size in SIZES:
            cached._cache.resize(size)
            np.testing.assert_array_equal(nats(cached, scored), expected)
            if size is not None:
                counters = cached.expert_cache()
                assert counters.misses > 0
                if size in (1, 1000):
                    assert (counters.overflow_steps > 0) == (size == 1)


@pytest.mark.parametrize("store", ["pinned", "disk"])
def test_one_token_at_a_time(folder, store):
    """Decoding: few rows, and steps that fit."""
    ids = torch.arange(20)[None] + 40
    plain = load_model(find_checkpoint(str(folder)), CPU, torch.float32, trust_remote_code=False)
    cached = load_model(
        find_checkpoint(str(folder)),
        CPU,
        torch.float32,
        trust_remote_code=False,
        caching=Caching(8, store=store),
    )
    states = [None, None]
    with torch.inference_mode():
        for i in range(20):
            outs = [
                m.model(ids[:, i : i + 1], past_key_values=s, use_cache=True)
                for m, s in zip((plain, cached), states, strict=True)
            ]
            states = [out.past_key_values for out in outs]
            assert torch.equal(outs[0].logits, outs[1].logits)
    assert cached.cache.counters().hits > 0
    cached.cache.close()


class Recorder:
    """The distinct experts of every step, taken from the routers' own choices."""

    def __init__(self, model):
        self.steps = {layer: [] for layer in modules_by_layer(model)}
        for layer, module in modules_by_layer(model).items():
            module.register_forward_pre_hook(lambda m, args, layer=layer: self.note(layer, args[1]))

    def note(self, layer, top_k_index):
        self.steps[layer].append(sorted(set(top_k_index.flatten().tolist())))


@pytest.mark.parametrize("policy", POLICIES)
def test_counts_equal_the_policy_over_the_recorded_steps(folders, policy):
    scored = windows(6, 12)
    with tiny.scorer(folders["qwen3_moe"], caching=Caching(2, policy)) as scorer:
        recorder = Recorder(scorer._model)
        for size in (1, 2, 5, 12):
            scorer._cache.resize(size)
            recorder.steps = {layer: [] for layer in recorder.steps}
            for window in scored:
                scorer.score([window])
            counters = scorer.expert_cache()
            assert [layer.layer for layer in counters.layers] == [0, 2], "layer 1 is dense"
            for layer in counters.layers:
                steps = recorder.steps[layer.layer]
                alone = make_policy(policy, size, 12)
                placements = [p for step in steps for p in alone.serve(step)]
                assert layer.steps == len(steps) == 6
                assert layer.hits == sum(p.hits for p in placements)
                assert layer.misses == sum(len(p.loads) for p in placements)
                assert layer.overflow_steps == sum(len(step) > size for step in steps)
                assert layer.bytes_moved == layer.misses * counters.expert_bytes


def test_counts_are_the_same_in_every_run(folders):
    found = []
    for _ in range(2):
        with tiny.scorer(folders["demo"], caching=Caching(8)) as scorer:
            scorer._threads = 4  # several passes a batch
            scorer.score(windows(8))
            layers = scorer.expert_cache().layers
            found.append([layer.model_dump(exclude={"copy_s"}) for layer in layers])
    assert found[0] == found[1]
    assert found[0][0]["steps"] == 4


def test_loading_leaves_no_trace_in_the_slots(folders):
    with tiny.scorer(folders["demo"], caching=Caching(8)) as scorer:
        assert all(layer.steps == 0 for layer in scorer.expert_cache().layers)
        assert all((cache.policy.expert_in == -1).all() for cache in scorer._cache.layers.values())


def test_the_weights_leave_the_model(folders):
    with tiny.scorer(folders["demo"], caching=Caching(8)) as scorer:
        names = [name for name, _ in scorer._model.named_parameters()]
        assert not any("experts" in name for name in names)
        assert scorer._cache.bytes == 2 * 8 * scorer._cache.store.layout.record_bytes


@pytest.mark.parametrize("source", ["qwen3_moe", "qwen3_5_moe", "stacked"])
@pytest.mark.parametrize(
    "recipe", [Recipe(method="rtn"), Recipe(format="hlwq"), None], ids=["int4", "hlwq", "bf16"]
)
def test_checkpoints_as_they_are_stored(checkpoints, stacked, tmp_path, source, recipe):
    """Per expert or stacked, multimodal or not, packed or not: the same nats as without a cache."""
    folder = stacked if source == "stacked" else checkpoints[source]
    if recipe is not None:
        quantize(folder, tmp_path / "quantized", recipe, device="cpu")
        folder = tmp_path / "quantized"
    scored = windows(2, 40, vocabulary=64)
    with tiny.scorer(folder, dtype="bfloat16") as plain:
        expected = nats(plain, scored)
    with tiny.scorer(folder, dtype="bfloat16", caching=Caching(2, store="disk")) as cached:
        for size in (1, 3, None):
            cached._cache.resize(size)
            np.testing.assert_array_equal(nats(cached, scored), expected)
        packed = recipe is not None and recipe.format == "int4"
        assert ("packed as INT4" in cached.facts.engaged["experts"]) == packed
        plain_bytes = 2 * 3 * 128 * 128
        record = cached._cache.store.layout.record_bytes
        assert record < plain_bytes / 3 if packed else record == plain_bytes


@pytest.mark.parametrize("tokens", [1, 5, 200])
@pytest.mark.parametrize("size", [1, 3, 16, None])
def test_the_grouped_forward_of_gpus(folders, tokens, size):
    """On the CPU's grouped product: as transformers' own where a step fits, and close where it overflows."""
    loaded = load_model(
        find_checkpoint(str(folders["qwen3_5_moe"])), CPU, torch.float32, trust_remote_code=False,
        caching=Caching(size),
    )  # fmt: skip
    whole = tiny.qwen3_5_moe()
    torch.manual_seed(7)
    for layer, module in modules_by_layer(loaded.model).items():
        hidden, index = torch.randn(tokens, 32), torch.stack([torch.randperm(16)[:2] for _ in range(tokens)])
        weights = torch.rand(tokens, 2)
        with torch.inference_mode():
            expected = grouped_mm_experts_forward(modules_by_layer(whole)[layer], hidden, index, weights)
            for _ in range(2):
                found = torch_cache.grouped_forward(module, hidden, index, weights)
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
                if size == 16:
                    assert torch.equal(found, expected)
    loaded.cache.close()


@pytest.mark.parametrize("decoded_bytes", [1, 1 << 28])
def test_the_grouped_forward_decodes_packed_experts(checkpoints, tmp_path, monkeypatch, decoded_bytes):
    monkeypatch.setattr(torch_cache, "DECODED_BYTES", decoded_bytes)
    quantize(checkpoints["qwen3_moe"], tmp_path / "int4", Recipe(method="rtn"), device="cpu")
    checkpoint = find_checkpoint(str(tmp_path / "int4"))
    whole = load_model(checkpoint, CPU, torch.bfloat16, trust_remote_code=False)
    cached = load_model(checkpoint, CPU, torch.bfloat16, trust_remote_code=False, caching=Caching(3))
    hidden, index = torch.randn(30, 128).bfloat16(), torch.stack([torch.randperm(4)[:2] for _ in range(30)])
    weights = torch.rand(30, 2).bfloat16()
    for one, other in zip(expert_modules(whole.model), expert_modules(cached.model), strict=True):
        with torch.inference_mode():
            expected = grouped_mm_experts_forward(one, hidden, index, weights)
            found = torch_cache.grouped_forward(other, hidden, index, weights)
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(found, expected, rtol=0.02, atol=1e-3)
    cached.cache.close()


def test_sizes_of_a_layer(folders):
    module = expert_modules(tiny.qwen3_5_moe())[0]
    shape = shape_of(module)
    assert (shape.experts, shape.hidden, shape.intermediate) == (16, 32, 16)
    assert shape.experts * shape.parameters == sum(p.numel() for p in module.parameters())


def test_a_dense_model_has_nothing_to_cache(llama_folder):
    with pytest.raises(UsageError, match="nothing to cache"), tiny.scorer(llama_folder, caching=Caching(8)):
        pass


def warnings_at(folder, size):
    with tiny.scorer(folder, caching=Caching(size)) as scorer:
        return scorer.facts.warnings


def test_odd_sizes_are_said(folders):
    assert "smaller than the 2 experts of one token" in warnings_at(folders["qwen3_5_moe"], 1)[0]
    assert "room for all 16 experts" in warnings_at(folders["qwen3_5_moe"], 17)[0]
    assert not warnings_at(folders["qwen3_5_moe"], 2)


def spoiled(folder, tmp_path, change):
    copy = tmp_path / "spoiled"
    shutil.copytree(folder, copy)
    (path,) = copy.glob("*.safetensors")
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})
    return copy


def first_expert(state):
    return next(name for name in sorted(state) if ".experts." in name)


def lose_one(state):
    del state[first_expert(state)]


def reshape_one(state):
    name = first_expert(state)
    state[name] = state[name][..., :1].contiguous()


@pytest.mark.parametrize("change", [lose_one, reshape_one])
@pytest.mark.parametrize("store", ["pinned", "disk"])
def test_a_checkpoint_whose_experts_are_incomplete(folders, tmp_path, change, store):
    folder = spoiled(folders["qwen3_moe"], tmp_path, change)
    with (
        pytest.raises(ModelError, match=r"whole experts|wrong shape"),
        tiny.scorer(folder, caching=Caching(2, store=store)),
    ):
        pass
    assert not list((tmp_path / "experts").glob("*"))


def test_a_changed_checkpoint_has_a_file_of_its_own(folders, tmp_path):
    def change(state):
        state[first_expert(state)] += 1

    folder = tmp_path / "copy"
    shutil.copytree(folders["qwen3_moe"], folder)
    scored = windows(1)
    found = []
    for use in (folder, folder, spoiled(folder, tmp_path, change)):
        with tiny.scorer(use, caching=Caching(4, store="disk")) as scorer:
            found.append((scorer.facts.engaged["expert_file"], nats(scorer, scored)))
    assert [state for state, _ in found] == ["written", "found", "written"]
    np.testing.assert_array_equal(found[0][1], found[1][1])
    assert abs(found[0][1] - found[2][1]).max() > 1e-3
