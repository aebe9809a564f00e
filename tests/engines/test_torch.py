"""The torch engine against brute force, transformers itself and models whose answer is known."""

import json
import math
from dataclasses import replace

import numpy as np
import oracles
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from engines import tiny
from evalsuite.core.errors import MeasurementError, ModelError, NonFiniteScore
from evalsuite.core.protocol import PROTOCOLS, protocol
from evalsuite.core.spans import span
from evalsuite.data.models import find_checkpoint
from evalsuite.data.windows import TokenWindow, cut, plan_windows
from evalsuite.engines.compute import resolve_compute
from evalsuite.engines.head import Head, nats_of
from evalsuite.engines.torch import TorchScorer, divergences

TOKENS = 75
SCALED = {"card-1155": (24, 6), "hf": (24, 9), "gptq": (20, None), "llama.cpp": (16, None), "paper": (24, 8)}


def scaled(name):
    """A preset small enough for one forward pass a token, and windows that do not divide the text."""
    return protocol(name).override(*SCALED[name])


@pytest.fixture(scope="module")
def loaded(model_and_folder):
    with tiny.scorer(model_and_folder[1]) as scorer:
        yield model_and_folder[0], scorer


@pytest.fixture(params=PROTOCOLS)
def windows_and_stream(request):
    chosen = scaled(request.param)
    stream = tiny.random_stream(TOKENS, window_bos=tiny.BOS if chosen.bos == "each-window" else None)
    return plan_windows(TOKENS, chosen), stream


def test_agrees_with_one_forward_pass_a_token(loaded, windows_and_stream):
    model, scorer = loaded
    windows, stream = windows_and_stream
    expected = oracles.brute_force(model, stream, windows)
    assert len(windows) > 2
    for batch in (1, 2, 3, len(windows)):
        found = tiny.scores_of(scorer, stream, windows, batch)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=3e-5, atol=3e-5)
    assert oracles.perplexity(found) == pytest.approx(oracles.perplexity(expected), rel=1e-5)


def test_chunks_of_the_head_change_nothing(loaded, windows_and_stream, monkeypatch):
    _, scorer = loaded
    windows, stream = windows_and_stream
    expected = tiny.scores_of(scorer, stream, windows, 3)
    monkeypatch.setattr("evalsuite.engines.head.CHUNK_BYTES", 1)
    monkeypatch.setattr("evalsuite.engines.head.CHUNK_POSITIONS", 4)
    found = tiny.scores_of(scorer, stream, windows, 3)
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), rtol=1e-5, atol=1e-5)


def test_agrees_with_transformers_own_loss(loaded):
    """With labels of −100 before the scored tokens, as the Hugging Face documentation has it."""
    model, scorer = loaded
    ids = tiny.random_stream(64).ids
    labels = torch.from_numpy(ids)[None].clone()
    labels[:, :40] = -100
    with torch.inference_mode():
        loss = float(model(torch.from_numpy(ids)[None], labels=labels).loss)
    (score,) = scorer.score([TokenWindow(0, ids, 40)])
    assert len(score.nats) == 24
    assert score.nats.mean() == pytest.approx(loss, rel=1e-5)


def test_no_token_sees_what_comes_after_it(loaded):
    _, scorer = loaded
    ids = tiny.random_stream(40).ids
    changed = ids.copy()
    changed[30] = (changed[30] + 1) % tiny.VOCABULARY
    (one,), (other,) = scorer.score([TokenWindow(0, ids, 1)]), scorer.score([TokenWindow(0, changed, 1)])
    np.testing.assert_allclose(one.nats[:29], other.nats[:29], rtol=1e-5, atol=1e-5)
    assert abs(one.nats[29] - other.nats[29]) > 1e-2
    assert abs(one.nats[30:] - other.nats[30:]).max() > 1e-3


def test_windows_of_unequal_length_in_one_batch_come_back_in_order(loaded):
    _, scorer = loaded
    ids = tiny.random_stream(TOKENS).ids
    windows = [TokenWindow(i, ids[: 10 + 7 * (i % 3)], 1 + i) for i in range(7)]
    together = scorer.score(windows)
    assert [score.index for score in together] == list(range(7))
    assert [len(score.nats) for score in together] == [w.scored for w in windows]
    for window, score in zip(windows, together, strict=True):
        np.testing.assert_allclose(score.nats, scorer.score([window])[0].nats, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("build", [tiny.llama, tiny.qwen3_5_moe])
def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(build, windows_and_stream, tmp_path):
    model = build()
    model.lm_head.weight.data.zero_()
    windows, stream = windows_and_stream
    with tiny.scorer(tiny.write(model, tmp_path / "uniform")) as scorer:
        scores = tiny.scores_of(scorer, stream, windows, 3)
    assert sum(len(one) for one in scores) == sum(w.scored for w in windows)
    assert oracles.perplexity(scores) == pytest.approx(tiny.VOCABULARY, rel=1e-6)


def test_tokens_weigh_alike_whatever_their_window(loaded):
    """On windows of unequal size; the mean of window means is another number, told apart by far."""
    model, scorer = loaded
    stream = tiny.random_stream(TOKENS)
    windows = plan_windows(TOKENS, scaled("hf"))
    sizes = [w.scored for w in windows]
    assert max(sizes) > 2 * min(sizes)
    scores = tiny.scores_of(scorer, stream, windows, 2)
    frame = pd.DataFrame({"nats": [math.fsum(s) for s in scores], "scored": sizes})
    wrong = math.exp(np.mean([np.mean(s) for s in scores]))
    right = oracles.perplexity(oracles.brute_force(model, stream, windows))
    assert abs(wrong / right - 1) > 1e-3
    assert span(frame, 0, len(frame)).perplexity == pytest.approx(right, rel=1e-5)


def test_hidden_states_and_head_give_the_nats_back(model_and_folder, tmp_path):
    stream = tiny.random_stream(TOKENS)
    windows = plan_windows(TOKENS, scaled("hf"))
    with tiny.scorer(model_and_folder[1], keep_hidden=True) as scorer:
        scores = scorer.score(list(cut(stream, windows)))
        scorer.save_head(tmp_path / "head.safetensors")
    head = Head.load(tmp_path / "head.safetensors", "cpu")
    hidden = torch.from_numpy(np.concatenate([s.hidden for s in scores])).view(torch.bfloat16)
    targets = torch.from_numpy(np.concatenate([stream.ids[w.first_scored : w.stop] for w in windows]))
    again = nats_of(hidden, targets, head).double().numpy()
    np.testing.assert_allclose(again, np.concatenate([s.nats for s in scores]), atol=0.1)
    assert again.sum() == pytest.approx(sum(s.nats.sum() for s in scores), rel=2e-3)


def test_divergences_of_two_folders(tmp_path):
    """Read in pieces, against full logits of the kept states."""
    torch.manual_seed(0)
    states = torch.randn(50, 16).bfloat16(), torch.randn(50, 24).bfloat16()
    heads = Head(torch.randn(400, 16)), Head(torch.randn(400, 24))
    folders = tmp_path / "a", tmp_path / "b"
    for folder, hidden, head in zip(folders, states, heads, strict=True):
        folder.mkdir()
        np.save(folder / "hidden.npy", hidden.view(torch.uint16).numpy())
        head.save(folder / "head.safetensors")
    kl, agree = divergences(*folders, device="cpu", rows=7)
    p, q = (oracles.full_logits(h, head.weight) for h, head in zip(states, heads, strict=True))
    np.testing.assert_allclose(kl, oracles.kl(p, q).numpy(), rtol=1e-5, atol=1e-5)
    assert np.array_equal(agree, (p.argmax(-1) == q.argmax(-1)).numpy())


class TestWhatTheRecordSays:
    def test_facts(self, model_and_folder):
        model, folder = model_and_folder
        with tiny.scorer(folder) as scorer:
            facts = scorer.facts
            assert scorer.load_s > 0
            assert scorer.memory().rss_peak_bytes > 1e7
        assert facts.parameters == sum(p.numel() for p in model.parameters())
        assert (facts.architecture, facts.vocabulary) == (type(model).__name__, tiny.VOCABULARY)
        assert (facts.max_context, facts.dtype, facts.device) == (512, "float32", "cpu")
        assert facts.stored == "FP32 safetensors"
        assert facts.stored_bytes == sum(p.stat().st_size for p in folder.glob("*.safetensors"))

    def test_a_gpu_that_does_not_exist(self):
        with pytest.raises(ModelError, match="There is no GPU 99") as error:
            resolve_compute("cuda:99", "auto")
        assert "--gpus" in error.value.todo


class TestFaults:
    def test_nan_names_window_and_token(self, llama_folder):
        path = llama_folder / "model.safetensors"
        state = load_file(path)
        state["model.embed_tokens.weight"][200] = math.nan
        save_file(state, path, metadata={"format": "pt"})
        ids = np.arange(40)
        with_200 = np.concatenate([np.arange(30), [200], np.arange(9)])
        with tiny.scorer(llama_folder) as scorer:
            scorer.score([TokenWindow(3, ids, 1)])
            with pytest.raises(NonFiniteScore, match=r"Window 4, token 35 \(id 4\) has .* nan") as error:
                scorer.score([TokenWindow(3, ids, 1), TokenWindow(4, with_200, 35)])
        assert "float32" in error.value.todo

    @pytest.mark.parametrize("row", [0, 5])
    def test_nan_among_the_first_tokens_is_no_fault_of_the_head(self, llama_folder, row):
        """The look at the head runs over the first tokens of the vocabulary."""
        path = llama_folder / "model.safetensors"
        state = load_file(path)
        state["model.embed_tokens.weight"][row] = math.nan
        save_file(state, path, metadata={"format": "pt"})
        with (
            tiny.scorer(llama_folder) as scorer,
            pytest.raises(NonFiniteScore, match="Window 0, token 1 "),
        ):
            scorer.score([TokenWindow(0, np.arange(40), 1)])

    def test_infinite_logits(self, llama_folder):
        path = llama_folder / "model.safetensors"
        state = load_file(path)
        state["lm_head.weight"][9] = math.inf
        save_file(state, path, metadata={"format": "pt"})
        with tiny.scorer(llama_folder) as scorer, pytest.raises(NonFiniteScore, match="Window 0"):
            scorer.score([TokenWindow(0, np.arange(40), 1)])

    @pytest.mark.parametrize("change", ["scaled", "shifted"])
    def test_a_head_that_is_more_than_a_projection(self, llama_folder, monkeypatch, change):
        from transformers import LlamaForCausalLM

        plain = LlamaForCausalLM.forward

        def forward(self, *args, **kwargs):
            output = plain(self, *args, **kwargs)
            if change == "scaled":
                output.logits = output.logits * 1.1
            else:
                output.logits = output.logits + torch.arange(output.logits.shape[-1]) / 100
            return output

        monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
        with (
            pytest.raises(MeasurementError, match="more than a projection") as error,
            tiny.scorer(llama_folder),
        ):
            pass
        assert error.value.exit_code == 1
        assert error.value.todo

    def test_missing_tensors(self, llama_folder):
        path = llama_folder / "model.safetensors"
        state = load_file(path)
        del state["model.layers.1.mlp.up_proj.weight"]
        save_file(state, path, metadata={"format": "pt"})
        with (
            pytest.raises(ModelError, match=r"lacks 1 tensors.*layers\.1\.mlp\.up_proj"),
            tiny.scorer(llama_folder),
        ):
            pass

    def test_unused_tensors(self, llama_folder):
        path = llama_folder / "model.safetensors"
        state = load_file(path)
        state["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3, 3)
        save_file(state, path, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"unused 1 tensors.*layers\.2"), tiny.scorer(llama_folder):
            pass

    def test_tensors_of_another_shape(self, llama_folder):
        path = llama_folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 80}))
        named = r"wrong shape for 6 tensors.*\.0\.mlp\.down_proj"
        with pytest.raises(ModelError, match=named) as error, tiny.scorer(llama_folder):
            pass
        assert error.value.exit_code == 2

    def test_a_file_cut_short(self, llama_folder):
        path = llama_folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(ModelError) as error, tiny.scorer(llama_folder):
            pass
        assert error.value.todo

    def test_an_architecture_that_nobody_knows(self, llama_folder):
        (llama_folder / "config.json").write_text('{"model_type": "perceptron-1958"}')
        with pytest.raises(ModelError, match="could not be loaded") as error, tiny.scorer(llama_folder):
            pass
        assert "perceptron-1958" in str(error.value)

    def test_code_that_comes_with_a_model_does_not_run(self, llama_folder):
        (llama_folder / "evil.py").write_text("raise SystemExit('this ran')\n")
        path = llama_folder / "config.json"
        config = json.loads(path.read_text()) | {"model_type": "evil"}
        config["auto_map"] = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
        path.write_text(json.dumps(config))
        with pytest.raises(ModelError, match="could not be loaded"), tiny.scorer(llama_folder):
            pass

    def test_a_pickle_beside_the_weights_is_not_opened(self, llama_folder):
        (llama_folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
        with tiny.scorer(llama_folder) as scorer:
            assert scorer.facts.stored == "FP32 safetensors"


def test_tied_embeddings_load(tmp_path):
    model = tiny.llama(tie_word_embeddings=True).eval()
    folder = tiny.write(model, tmp_path / "tied")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    stream, windows = tiny.random_stream(TOKENS), plan_windows(TOKENS, scaled("gptq"))
    with tiny.scorer(folder) as scorer:
        found = tiny.scores_of(scorer, stream, windows, 2)
    expected = oracles.brute_force(model, stream, windows)
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), rtol=3e-5, atol=3e-5)


def test_bfloat16_is_near_float32(model_and_folder):
    stream, windows = tiny.random_stream(TOKENS), plan_windows(TOKENS, scaled("gptq"))
    scores = []
    for dtype in ("float32", "bfloat16"):
        with tiny.scorer(model_and_folder[1], dtype=dtype) as scorer:
            assert scorer.facts.computed == f"{dtype} on cpu"
            scores.append(np.concatenate(tiny.scores_of(scorer, stream, windows, 2)))
    assert abs(scores[0] - scores[1]).max() > 1e-4, "float32 was asked for, and is something else"
    assert scores[0].mean() == pytest.approx(scores[1].mean(), rel=1e-2)


def test_a_saved_checkpoint_is_what_is_scored(model_and_folder):
    """The name in the record, and a file whose name ends in nothing known is refused."""
    checkpoint = find_checkpoint(str(model_and_folder[1]))
    scorer = TorchScorer(replace(checkpoint, name="renamed"), device="cpu", dtype="float32")
    assert scorer.facts.name == "renamed"
    scorer.close()
