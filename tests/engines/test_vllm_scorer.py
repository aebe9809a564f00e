"""The vLLM engine as a scorer: the real vLLM on the CPU against torch and against its own log-probabilities."""

import os

import numpy as np
import pytest
import torch
from vllm_cpu.present import ENVIRONMENT, needs_vllm, run_two_ranks

from engines import tiny
from evalsuite.core.errors import MeasurementError, NonFiniteScore, OutOfMemory
from evalsuite.core.spec import Serving
from evalsuite.data.models import find_checkpoint
from evalsuite.data.windows import TokenWindow
from evalsuite.engines.head import Head, nats_of

pytestmark = [needs_vllm, pytest.mark.xdist_group("vllm scorer")]

IDS = np.random.default_rng(5).integers(0, tiny.VOCABULARY, 600)
CONTEXT = 96
STEP_TOKENS = 128  # more than a window, less than two: prompts are cut wherever a step is full
WINDOWS = [
    TokenWindow(index, IDS[start : start + length], offset)
    for index, (start, length, offset) in enumerate(
        [(0, 96, 64), (30, 96, 64), (200, 40, 1), (300, 2, 1), (400, 96, 95), (450, 77, 20)]
    )
]


@pytest.fixture(scope="module", params=["qwen3_moe", "llama"])
def folder(request, tmp_path_factory):
    model = tiny.qwen3_moe() if request.param == "qwen3_moe" else tiny.llama(hidden_size=64)
    return tiny.write(model, tmp_path_factory.mktemp("vllm") / request.param)


@pytest.fixture(scope="module")
def scorer(folder):
    from evalsuite.engines.vllm_scorer import VllmScorer

    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        before, threads = dict(os.environ), torch.set_num_threads
        serving = Serving(engine="vllm", dtype="float32", enforce_eager=True)
        loaded = VllmScorer(
            find_checkpoint(str(folder)),
            serving,
            context=CONTEXT + 1,  # room for the oracle's token
            keep_hidden=True,
            step_tokens=STEP_TOKENS,
        )
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        yield loaded
        loaded.close()
        assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ
        assert os.environ["VLLM_CPU_KVCACHE_SPACE"] == before["VLLM_CPU_KVCACHE_SPACE"]
        assert torch.set_num_threads is threads, "vLLM replaces it"


@pytest.fixture(scope="module")
def expected(folder):
    """By the torch engine."""
    with tiny.scorer(folder, keep_hidden=True) as loaded:
        return loaded.score(WINDOWS)


@pytest.mark.parametrize("batch", [1, 2, len(WINDOWS)])
def test_float32_agrees_with_torch_token_by_token(scorer, expected, batch):
    found = [s for i in range(0, len(WINDOWS), batch) for s in scorer.score(WINDOWS[i : i + batch])]
    assert [score.index for score in found] == [window.index for window in WINDOWS]
    for window, one, other in zip(WINDOWS, found, expected, strict=True):
        assert one.nats.shape == (window.scored,)
        assert one.nats.dtype == np.float64
        np.testing.assert_allclose(one.nats, other.nats, rtol=0, atol=1e-4)
        kept, reference = (
            torch.from_numpy(score.hidden).view(torch.bfloat16).float() for score in (one, other)
        )
        torch.testing.assert_close(kept, reference, rtol=1e-2, atol=1e-3)  # one step of bfloat16


def test_agrees_with_vllms_own_log_probabilities(scorer):
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    for window, score in zip(WINDOWS, scorer.score(WINDOWS), strict=True):
        ids = window.ids.tolist()
        (answer,) = scorer._llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        own = [-answer.prompt_logprobs[place][ids[place]].logprob for place in range(window.offset, len(ids))]
        np.testing.assert_allclose(score.nats, own, rtol=0, atol=1e-4)


def test_the_head_turns_kept_states_back_into_the_scores(scorer, folder, tmp_path):
    scorer.save_head(tmp_path / "head.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["head.safetensors"]
    head = Head.load(tmp_path / "head.safetensors", "cpu")
    with tiny.scorer(folder) as loaded:
        assert torch.equal(head.weight, loaded._head.weight), "without vLLM's padding"
    (score,) = scorer.score(WINDOWS[:1])
    hidden = torch.from_numpy(score.hidden).view(torch.bfloat16)
    targets = torch.from_numpy(WINDOWS[0].ids[WINDOWS[0].offset :])
    np.testing.assert_allclose(nats_of(hidden, targets, head).numpy(), score.nats, atol=0.1)


def test_facts_name_the_engine(scorer, folder):
    facts = scorer.facts
    with tiny.scorer(folder) as loaded:
        same = ("name", "architecture", "parameters", "vocabulary", "fingerprint", "stored_bytes", "dtype")
        for field in same:
            assert getattr(facts, field) == getattr(loaded.facts, field), field
    assert facts.computed == "float32 on cpu by vLLM"
    assert facts.engaged["vllm"].endswith("cpu")
    assert facts.engaged["step_tokens"] == STEP_TOKENS
    assert scorer.memory().rss_peak_bytes > 0
    assert scorer.largest_batch(WINDOWS[0]) >= STEP_TOKENS // CONTEXT


def watch_of(scorer):
    engine = scorer._llm.llm_engine.engine_core.engine_core
    return engine.model_executor.driver_worker.worker._hlwq


def test_a_score_that_is_not_finite_ends_the_run(scorer, expected):
    bias = torch.zeros(tiny.VOCABULARY)
    bias[int(WINDOWS[1].ids[70])] = torch.nan
    watch = watch_of(scorer)
    whole, watch.head = watch.head, Head(watch.head.weight, bias)
    try:
        with pytest.raises(NonFiniteScore, match="Window 1, token 64"):
            scorer.score(WINDOWS[1:2])
    finally:
        watch.head = whole
    np.testing.assert_allclose(scorer.score(WINDOWS[1:2])[0].nats, expected[1].nats, atol=1e-4)


def test_a_step_that_does_not_fit_leaves_nothing_behind(scorer, expected, monkeypatch):
    watch, calls = watch_of(scorer), []
    score = type(watch)._score

    def full(self, states, cuts):
        calls.append(len(cuts))
        if len(calls) == 2:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        score(self, states, cuts)

    monkeypatch.setattr(type(watch), "_score", full)
    with pytest.raises(OutOfMemory, match="does not fit in memory"):
        scorer.score(WINDOWS)
    found = scorer.score(WINDOWS)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.nats, other.nats, rtol=0, atol=1e-4)
    assert not scorer._llm.llm_engine.has_unfinished_requests()


def test_a_failure_inside_vllm_is_explained(scorer, monkeypatch):
    watch = watch_of(scorer)

    def broken(*arguments):
        raise RuntimeError("a kernel's complaint")

    monkeypatch.setattr(watch, "execute", broken)
    with pytest.raises(MeasurementError, match="a kernel's complaint"):
        scorer.score(WINDOWS[:2])
    monkeypatch.undo()
    assert len(scorer.score(WINDOWS[:2])) == 2


def test_positions_that_vllm_left_out_are_not_passed_over(scorer, monkeypatch):
    watch = watch_of(scorer)
    cuts = type(watch)._cuts
    monkeypatch.setattr(type(watch), "_cuts", lambda self, *rest: list(cuts(self, *rest))[1:])
    with pytest.raises(MeasurementError, match="0 of 32 scored positions of window 0"):
        scorer.score(WINDOWS[:1])


def test_damaged_weights_are_no_fault_of_the_head(scorer, monkeypatch):
    watch = watch_of(scorer)
    weight = watch.head.weight.clone()
    weight[7] = torch.nan
    model = watch.runner.get_model()
    compute = model.compute_logits

    def damaged(states):
        logits = compute(states)
        logits[:, 7] = torch.nan
        return logits

    monkeypatch.setattr(watch, "head", Head(weight))
    monkeypatch.setattr(model, "compute_logits", damaged)
    scorer._check_head("it")
    monkeypatch.setattr(model, "compute_logits", compute)
    with pytest.raises(MeasurementError, match="more than a projection"):
        scorer._check_head("it")  # NaN of ours alone


def test_a_head_that_is_more_than_a_projection_is_refused(scorer, monkeypatch):
    watch = watch_of(scorer)
    monkeypatch.setattr(watch, "head", Head(watch.head.weight * 1.01))
    with pytest.raises(MeasurementError, match="more than a projection"):
        scorer._check_head("it")


@pytest.mark.slow
def test_a_head_shared_out_over_two_ranks(tmp_path):
    folder = tiny.write(tiny.qwen3_moe(), tmp_path / "moe")
    run_two_ranks("two_ranks.py", folder, tmp_path)
    with tiny.scorer(folder) as loaded:
        expected = loaded.score([TokenWindow(0, np.arange(60), 20), TokenWindow(1, np.arange(100, 140), 1)])
        weight = loaded._head.weight
    for score in expected:
        found = np.load(tmp_path / f"{score.index}.npy")
        np.testing.assert_allclose(found, score.nats, rtol=0, atol=1e-4)
    assert torch.equal(Head.load(tmp_path / "head.safetensors", "cpu").weight, weight)
