"""Greedy generation: transformers' own tokens, the same with a cache of any size."""

import numpy as np
import pytest
import torch

from engines import tiny
from engines.test_torch_cache import Recorder, folders  # noqa: F401 (a fixture)
from evalsuite.core.errors import UsageError
from evalsuite.core.spec import Serving
from evalsuite.data.models import find_checkpoint
from evalsuite.engines.torch_generator import TorchGenerator
from evalsuite.experts.policy import make_policy

FLOAT32 = {"dtype": "float32"}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HLWQ_EVAL_CACHE", str(tmp_path / "experts"))


@pytest.fixture
def generator():
    opened = []

    def make(folder, **options):
        opened.append(TorchGenerator(find_checkpoint(str(folder)), Serving(**FLOAT32 | options)))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def prompts(count, length=11):
    return list(np.random.default_rng(4).integers(0, 256, (count, length)))


def ids_of(generator, requests, length=6):
    return [out.ids.tolist() for out in generator.generate(requests, length, lambda: None)]


@pytest.mark.parametrize("model", ["demo", "qwen3_moe", "qwen3_5_moe", "llama"])
def test_the_tokens_are_the_models_own(generator, folders, model, llama_folder, request):  # noqa: F811
    folder = llama_folder if model == "llama" else folders[model]
    loaded = generator(folder)
    requests = prompts(2)
    expected = []
    for request_ids in requests:
        ids = request_ids.tolist()
        with torch.inference_mode():
            for _ in range(6):  # no cache of keys and values: every prefix anew
                logits = loaded._loaded.model(torch.tensor([ids]), use_cache=False).logits
                ids.append(int(logits[0, -1].argmax()))
        expected.append(ids[11:])
    assert ids_of(loaded, requests) == expected
    assert [ids_of(loaded, [one])[0] for one in requests] == expected


@pytest.mark.parametrize("model", ["demo", "qwen3_moe", "qwen3_5_moe"])
@pytest.mark.parametrize("store", ["pinned", "disk"])
def test_the_same_tokens_at_every_size_without_loading_again(generator, folders, model, store):  # noqa: F811
    requests = prompts(2)
    expected = ids_of(generator(folders[model]), requests)
    cached = generator(folders[model], moe_expert_cache_size=8, moe_expert_store=store)
    weights = cached._loaded.model.get_output_embeddings().weight
    for size in (1, 2, 8, 64, None, 3):
        cached.resize_expert_cache(size)
        assert ids_of(cached, requests) == expected
        assert (cached.expert_cache() is None) == (size is None)
    assert cached._loaded.model.get_output_embeddings().weight is weights


def test_a_model_without_a_cache_gets_one_later(generator, folders):  # noqa: F811
    loaded = generator(folders["qwen3_5_moe"])
    whole = loaded.memory().weights_bytes
    expected = ids_of(loaded, prompts(1))
    assert loaded.expert_cache() is None
    loaded.resize_expert_cache(4)
    assert ids_of(loaded, prompts(1)) == expected
    counters = loaded.expert_cache()
    assert counters.hits > 0
    assert counters.size == 4
    assert loaded.memory().weights_bytes == whole - 2 * 12 * counters.expert_bytes
    assert loaded.facts.engaged["experts"] == "cached"


def test_counts_of_prefill_and_decode_equal_the_policys(generator, folders):  # noqa: F811
    loaded = generator(folders["qwen3_5_moe"], moe_expert_cache_size=3, moe_expert_cache_policy="lfru")
    assert all(layer.steps == 0 for layer in loaded.expert_cache().layers), "loading leaves no trace"
    recorder = Recorder(loaded._loaded.model)
    ids_of(loaded, prompts(2), 5)
    for layer in loaded.expert_cache().layers:
        alone = make_policy("lfru", 3, 16)
        placements = [p for step in recorder.steps[layer.layer] for p in alone.serve(step)]
        assert layer.steps == 5
        assert (layer.hits, layer.misses) == (
            sum(p.hits for p in placements),
            sum(len(p.loads) for p in placements),
        )
    loaded.reset_counters()
    assert loaded.expert_cache().hit_rate is None


def test_times_and_the_first_token(generator, folders):  # noqa: F811
    loaded = generator(folders["qwen3_5_moe"])
    called = []
    outs = loaded.generate(prompts(3), 5, lambda: called.append(True))
    assert called == [True]
    for out in outs:
        assert out.ids.dtype == np.int64
        assert out.ids.shape == out.token_s.shape == (5,)
        assert out.submitted_s < out.token_s[0]
        assert (np.diff(out.token_s) > 0).all()
    assert loaded.load.total_s >= loaded.load.weights_s > 0
    assert loaded.load.resident_share is None


def test_memory(generator, folders):  # noqa: F811
    loaded = generator(folders["qwen3_5_moe"])
    expected = sum(p.nbytes for p in loaded._loaded.model.parameters())
    memory = loaded.memory()
    assert expected <= memory.weights_bytes < expected + 1000, "buffers are small"
    assert memory.kv_cache_bytes == 0
    ids_of(loaded, prompts(1, 20), 4)
    small = loaded.memory().kv_cache_bytes
    ids_of(loaded, prompts(1, 120), 4)
    # one layer of full attention: keys and values of one head of 16
    assert loaded.memory().kv_cache_bytes - small == 100 * 2 * 16 * 4
    assert set(memory.absent) == {"allocated_peak_bytes", "reserved_peak_bytes"}


def test_eager_whatever_is_asked(generator, folders):  # noqa: F811
    for eager in (True, False):
        assert generator(folders["qwen3_5_moe"], enforce_eager=eager).facts.engaged["mode"] == "eager"


def test_random_weights_are_the_same_in_every_process_and_said(generator, folders, tmp_path):  # noqa: F811
    options = {"load_format": "dummy"}
    first, second = (generator(folders["qwen3_moe"], **options) for _ in range(2))
    expected = ids_of(first, prompts(2))
    assert ids_of(second, prompts(2)) == expected
    cached = generator(folders["qwen3_moe"], **options, moe_expert_cache_size=4, moe_expert_store="disk")
    assert ids_of(cached, prompts(2)) == expected
    assert cached.facts.engaged["load_format"] == "dummy"
    assert cached.facts.stored_bytes == 0
    assert "random weights" in cached.facts.warnings[0]
    real = generator(folders["qwen3_moe"], moe_expert_cache_size=4, moe_expert_store="disk")
    assert real.facts.engaged["expert_file"] == "written", "never the random experts"
    assert ids_of(real, prompts(2)) != expected


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size"),
        ({"server_url": "http://localhost:1"}, "--server-url"),
        ({"additional_config": {"a": 1}}, "--additional-config"),
        ({"gpu_memory_utilization": 0.5}, "--gpu-memory-utilization"),
        ({"gpus": (0, 1)}, "more than one GPU"),
    ],
)
def test_what_it_does_not_have_is_refused(options, named, folders):  # noqa: F811
    with pytest.raises(UsageError, match=named):
        TorchGenerator(find_checkpoint(str(folders["qwen3_moe"])), Serving(**FLOAT32 | options))


def test_a_dense_model_has_nothing_to_cache(generator, llama_folder):
    with pytest.raises(UsageError, match="nothing to cache"):
        generator(llama_folder, moe_expert_cache_size=8)
    loaded = generator(llama_folder)
    with pytest.raises(UsageError, match="nothing to cache"):
        loaded.resize_expert_cache(8)
    assert loaded.expert_cache() is None


def test_impossible_requests(generator, folders):  # noqa: F811
    loaded = generator(folders["qwen3_5_moe"], moe_expert_cache_size=4)
    with pytest.raises(UsageError, match="one length"):
        loaded.generate([*prompts(1, 3), *prompts(1, 4)], 2, lambda: None)
    with pytest.raises(UsageError, match="leave the context"):
        loaded.generate(prompts(1, 500), 20, lambda: None)
    with pytest.raises(UsageError, match="holds none"):
        loaded.resize_expert_cache(0)
    assert max(ids_of(loaded, prompts(1))[0]) < tiny.VOCABULARY
