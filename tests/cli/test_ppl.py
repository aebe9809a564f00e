"""`hlwq-eval ppl` and `compare` as a user meets them."""

import errno
import json
import math
import os
import shutil
from pathlib import Path

import pytest
from engines import tiny

from evalsuite.core.record import CompareResult, PerplexityResult, Record

SMALL = ("--context", 64, "--stride", 32)


def runs(folder, kind="ppl"):
    return sorted(p for p in Path(folder).glob(f"*/{kind}-*") if p.suffix != ".partial")


def partials(folder):
    return sorted(Path(folder).glob("*/*.partial"))


@pytest.mark.parametrize("arguments", [["--help"], ["ppl", "--help"], ["compare", "--help"], ["--version"]])
def test_help_answers_at_once(arguments):
    """No heavy library is imported."""
    import subprocess
    import sys

    from cli.conftest import environment

    code = (
        "import sys\nfrom evalsuite.cli.app import main\n"
        "try:\n    main()\nfinally:\n"
        "    heavy = {'torch', 'transformers', 'pandas', 'numpy', 'matplotlib', 'datasets'} & set(sys.modules)\n"
        "    print('heavy:', sorted(heavy))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "heavy: []" in done.stdout
    assert "hlwq-eval" in done.stdout
    assert not done.stderr


def test_the_built_in_model_in_a_process_of_its_own(shell, tmp_path):
    done = shell("ppl", "--limit", 12, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)  # and nothing else
    path = tmp_path / document.pop("path")
    record = Record.model_validate(document)
    assert Record.model_validate_json((path / "run.json").read_text()) == record
    assert isinstance(record.results, PerplexityResult)
    assert (record.results.windows, record.results.scored_tokens) == (12, 12 * 256)
    assert record.results.windows_available >= 1155
    assert 1.5 < record.results.perplexity < 12, "a byte-level model that learnt something"
    assert record.text.corpus == "builtin"
    assert record.status == "ok"
    assert any("built-in model" in warning for warning in record.warnings)
    for name in ("convergence.png", "convergence.svg", "windows.parquet"):
        assert (path / name).stat().st_size > 1000
    assert "perplexity, 95 % interval" in done.stderr
    assert "hlwq-eval ppl MODEL" in done.stderr, "how to go on"
    assert "12 of 12 windows" in done.stderr
    assert not partials(tmp_path / "results")


def test_tables_go_to_standard_output_without_json(cli, models, text):
    done = cli("ppl", models / "base", "--corpus", text, *SMALL)
    assert done.code == 0
    assert "perplexity, 95 % interval" in done.out
    assert "record: results/base/ppl-" in done.err
    assert "perplexity, 95" not in done.err


class TestRefusals:
    """Wrong usage: exit 2, one message with a next step, before any weight is read."""

    @pytest.fixture(autouse=True)
    def _no_weights(self, monkeypatch):
        def refuse(*arguments, **options):
            raise AssertionError("a model was loaded")

        monkeypatch.setattr("evalsuite.engines.torch.load_model", refuse)

    @pytest.mark.parametrize(
        ("arguments", "named", "step"),
        [
            (["--protocol", "hff"], "hff", "choose one of card-1155"),
            (["--context", 64, "--stride", 65], "stride 65 is larger than context 64", "Next:"),
            (["--context", 1], "no usable protocol", "Next:"),
            (["--stride", 0], "no usable protocol", "Next:"),
            (["--batch-size", "x"], "--batch-size x", "try auto"),
            (["--batch-size", "0"], "--batch-size 0", "try auto"),
            (["--batch-size", "²"], "--batch-size ²", "try auto"),
            (["--gpus", "a"], "--gpus a", "--gpus 0"),
            (["--gpus", "0,1"], "--gpus 0,1", "--gpus 0"),
            (["--gpus", "77"], "no GPU 77", "doctor"),
            (["--gpus", "²"], "--gpus ²", "--gpus 0"),
            (["--windows", 5], "--windows and --tokens", "--explain"),
            (["--windows", 5, "--tokens", 5], "--windows and --tokens", "--explain"),
            (["--explain", "--tokens", 5], "--windows and --tokens", "--explain"),
            (["--corpus", "no-such.txt"], "no-such.txt", "choose wikitext-2, builtin"),
            (["--context", 100_000], "context of 4,096", "--context 4096"),
            (["--tokenizer", "/nowhere/at/all"], "/nowhere/at/all", "give a folder"),
            (["--resume"], "no unfinished ppl run", "leave out --resume"),
            (["--limit", 0], "--limit", "--help"),
            (["--dtype", "float8"], "--dtype", "float32"),
            (["--engine", "magic"], "--engine", "torch"),
            (["--strides", 5], "--strides", "--help"),
        ],
        ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
    )
    def test_bad_flags(self, cli, arguments, named, step, tmp_path):
        done = cli("ppl", *arguments)
        assert done.code == 2
        assert named in done.said
        assert step in done.said
        assert done.out == ""
        assert not list(tmp_path.glob("results/*/*"))

    @pytest.mark.parametrize("name", ["no-such-model", "./no/such/folder", "no-such/model"])
    def test_a_missing_model(self, cli, name):
        done = cli("ppl", name, "--corpus", "builtin")
        assert done.code == 2
        assert name in done.said
        assert "Next:" in done.said

    def test_a_text_shorter_than_a_window(self, cli, models, text):
        text.write_text("short")
        done = cli("ppl", models / "base", "--corpus", text, *SMALL)
        assert done.code == 2
        assert "5 tokens, less than one window of 64" in done.said
        assert "smaller --context" in done.said

    def test_a_context_longer_than_the_model_allows(self, cli, models, text):
        done = cli("ppl", models / "base", "--corpus", text)
        assert done.code == 2
        assert "base has a context of 512 tokens, and the protocol asks for 1,536" in done.said
        assert "--context 512" in done.said

    def test_a_tokenizer_that_knows_more_than_the_model(self, cli, text, tmp_path):
        folder = tiny.write(tiny.llama(vocab_size=200), tmp_path / "small")
        done = cli("ppl", folder, "--corpus", text, *SMALL)
        assert done.code == 2
        assert "has 257 tokens and small knows 200" in done.said
        assert "Next:" in done.said

    def test_the_request_is_judged_before_a_model_is_downloaded(self, cli, monkeypatch):
        """A missing text, or a missing GPU, must not cost 70 GB first."""

        def refuse(*arguments, **options):
            raise AssertionError("a model was looked for")

        monkeypatch.setattr("evalsuite.run.perplexity.find_checkpoint", refuse)
        assert cli("ppl", "some/model", "--corpus", "no-such.txt").code == 2
        assert cli("ppl", "some/model", "--corpus", "builtin", "--gpus", "77").code == 2


class TestFailures:
    def test_nan_weights(self, cli, text, tmp_path):
        model = tiny.llama()
        model.model.norm.weight.data[3] = float("nan")
        done = cli("ppl", tiny.write(model, tmp_path / "broken"), "--corpus", text, *SMALL)
        assert done.code == 1
        assert "Window 0, token 32" in done.said
        (folder,) = partials(tmp_path / "results")
        record = Record.model_validate_json((folder / "run.json").read_text())
        assert record.status == "failed"
        assert "Window 0" in record.error
        assert record.results is None

    def test_missing_tensors(self, cli, text, tmp_path):
        from safetensors.torch import load_file, save_file

        folder = tiny.write(tiny.llama(), tmp_path / "incomplete")
        state = load_file(folder / "model.safetensors")
        del state["model.norm.weight"]
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        done = cli("ppl", folder, "--corpus", text, *SMALL)
        assert done.code == 2
        assert "lacks 1 tensors" in done.said

    def test_a_full_disk(self, cli, models, text, monkeypatch, tmp_path):
        """Finished windows are kept; the same command resumes and ends like an undisturbed run."""
        arguments = ("ppl", models / "base", "--corpus", text, *SMALL, "--batch-size", 3)
        real, calls = os.fsync, []

        def full(descriptor):
            calls.append(descriptor)
            if len(calls) > 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(descriptor)

        monkeypatch.setattr("os.fsync", full)
        done = cli(*arguments)
        assert done.code == 1
        assert "the disk is full" in done.said
        assert "make room" in done.said
        monkeypatch.setattr("os.fsync", real)
        again = cli(*arguments, "--resume", "--json")
        assert again.code == 0
        document = json.loads(again.out)
        assert document["results"]["resumed_from_window"] >= 6
        whole = json.loads(cli(*arguments, "--fresh", "--json").out)
        assert whole["results"]["resumed_from_window"] == 0
        paths = [tmp_path / d["path"] / "windows.parquet" for d in (document, whole)]
        assert paths[0] != paths[1]
        assert paths[0].read_bytes() == paths[1].read_bytes()

    def test_nowhere_to_write(self, cli, models, text, tmp_path):
        (tmp_path / "results").write_text("a file")
        done = cli("ppl", models / "base", "--corpus", text, *SMALL)
        assert done.code == 1
        assert "results" in done.said


class TestExplain:
    def test_which_protocols_fit_a_card(self, cli):
        done = cli("ppl", "--explain", "--windows", 1155, "--tokens", 295_680, "--json")
        assert done.code == 0
        fits = json.loads(done.out)
        assert [(f["tokens"], f["protocol"]["context"], f["protocol"]["stride"]) for f in fits] == [
            (297_193, 1536, 256), (299_078, 3456, 256)
        ]  # fmt: skip
        low, high = fits[0]["contexts"]
        assert low <= 1536 <= high
        assert (low, high) == (1514, 1769)

    def test_nothing_fits(self, cli):
        done = cli("ppl", "--explain", "--windows", 7, "--tokens", 12345)
        assert done.code == 0
        assert "No common protocol gives these counts" in done.out

    def test_the_presets_without_a_model(self, cli):
        done = cli("ppl", "--explain", "--json")
        rows = {
            (r["protocol"]["name"], r["tokens"]): (r["windows"], r["scored_tokens"])
            for r in json.loads(done.out)
        }
        assert rows["card-1155", 297_193] == (1155, 295_680)
        assert rows["paper", 297_193] == (577, 577 * 512)
        assert rows["gptq", 297_193] == (145, 145 * 2048 - 145)
        assert rows["hf", 297_193][1] == 297_192

    def test_a_model_of_ones_own(self, cli, models, text):
        done = cli("ppl", models / "base", "--explain", "--corpus", text, *SMALL, "--json")
        row = json.loads(done.out)[0]
        assert (row["tokens"], row["windows"], row["scored_tokens"]) == (1400, 42, 42 * 32)
        assert row["protocol"]["name"] == "card-1155*"

    def test_each_protocol_is_counted_on_the_text_that_it_joins(self, cli):
        """llama.cpp scores the raw text; blank lines between its rows would be other tokens."""
        from evalsuite.data.corpora import load_corpus

        done = cli("ppl", "demo", "--explain", "--json")
        tokens = {r["protocol"]["name"]: r["tokens"] for r in json.loads(done.out)}
        corpus = load_corpus("builtin")
        assert tokens["card-1155"] == len(corpus.text("blank-line").encode())
        assert tokens["llama.cpp"] == len(corpus.text("raw").encode())

    def test_a_hub_model_is_not_downloaded(self, cli, monkeypatch):
        def refuse(*arguments, **options):
            raise AssertionError("weights were asked for")

        def offline(*arguments, **options):
            raise OSError("no network")

        monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
        done = cli("ppl", "some/model", "--explain", "--corpus", "builtin")
        assert done.code == 2
        assert "No tokenizer is to be had from 'some/model'" in done.said


class TestBaselines:
    def test_a_model(self, cli, models, text, tmp_path):
        done = cli("ppl", models / "other", "--baseline", models / "base", "--corpus", text, *SMALL, "--json")
        assert done.code == 0
        document = json.loads(done.out)
        comparison = document["comparison"]["results"]
        assert document["model"]["name"] == "other"
        CompareResult.model_validate(comparison)
        assert comparison["baseline_run"].startswith("base/")
        assert comparison["divergence"]["tokens"] == comparison["scored_tokens"] == 42 * 32
        assert comparison["divergence"]["mean"] > 1e-3
        assert 0 < comparison["divergence"]["top1_agreement"] < 1
        ratio = comparison["candidate_perplexity"] / comparison["baseline_perplexity"]
        assert comparison["delta_ln_ppl"] == pytest.approx(math.log(ratio), rel=1e-9)
        assert [len(runs(tmp_path / "results", kind)) for kind in ("ppl", "compare")] == [2, 1]

    def test_a_run_whose_text_and_protocol_are_taken_over(self, cli, models, text, tmp_path):
        base = json.loads(
            cli(
                "ppl", models / "base", "--corpus", text, *SMALL, "--limit", 30, "--keep-hidden", "--json"
            ).out
        )
        done = cli("ppl", models / "base", "--baseline", base["run_id"], "--json")
        assert done.code == 0, done.err
        document = json.loads(done.out)
        assert document["spec"]["corpus"] == str(text)
        assert document["results"]["windows"] == 30
        assert document["protocol"]["context"] == 64
        comparison = document["comparison"]["results"]
        assert comparison["delta_ln_ppl"] == 0
        assert comparison["divergence"]["mean"] == pytest.approx(0, abs=1e-6)
        assert comparison["divergence"]["top1_agreement"] == 1

    def test_an_impossible_comparison_is_refused_before_scoring(
        self, cli, models, text, monkeypatch, tmp_path
    ):
        base = json.loads(cli("ppl", models / "base", "--corpus", text, *SMALL, "--limit", 12, "--json").out)
        for changes in (("--limit", 5), ("--stride", 16, "--context", 64)):
            done = cli("ppl", models / "other", "--baseline", base["run_id"], *changes)
            assert done.code == 2
            assert "cannot be compared" in done.said
        assert not (tmp_path / "results" / "other").exists()

    def test_compare_without_hidden_states_says_so(self, cli, models, text, tmp_path):
        for name in ("base", "other"):
            assert cli("ppl", models / name, "--corpus", text, *SMALL).code == 0
        first, second = (p.name for p in runs(tmp_path / "results"))
        done = cli("compare", first, second)
        assert done.code == 0
        assert "--keep-hidden" in done.out
        assert "KL divergence [nats]: mean" in done.out
        assert len(runs(tmp_path / "results", "compare")) == 1

    def test_compare_of_unlike_runs(self, cli, models, text, tmp_path):
        assert cli("ppl", models / "base", "--corpus", text, *SMALL).code == 0
        assert cli("ppl", models / "other", "--corpus", text, *SMALL, "--limit", 9).code == 0
        done = cli("compare", *(p for p in runs(tmp_path / "results")))
        assert done.code == 2
        assert "windows: 42 against 9" in done.said

    def test_models_with_vocabularies_padded_differently(self, cli, models, text, tmp_path):
        """As within the Qwen2.5 family: one tokenizer, 151,936 or 152,064 rows in the head."""
        padded = tiny.write(tiny.llama(vocab_size=260), tmp_path / "padded")
        done = cli("ppl", padded, "--baseline", models / "base", "--corpus", text, *SMALL, "--json")
        assert done.code == 0, done.err
        comparison = json.loads(done.out)["comparison"]["results"]
        assert comparison["divergence"] is None
        assert "257" in comparison["divergence_absent"]
        assert "260" in comparison["divergence_absent"]

    def test_two_models_of_one_name_are_two_curves(self, cli, models, text, tmp_path, monkeypatch):
        shutil.copytree(models / "other", tmp_path / "elsewhere" / "base")
        seen = []

        def convergence(curves, title, caption, out):
            seen.append(list(curves))
            return [out.with_suffix(".png"), out.with_suffix(".svg")]

        monkeypatch.setattr("evalsuite.cli.perplexity_run.convergence", convergence)
        done = cli(
            "ppl", tmp_path / "elsewhere" / "base", "--baseline", models / "base", "--corpus", text, *SMALL
        )
        assert done.code == 0, done.err
        assert len(set(seen[0])) == 2

    @pytest.mark.parametrize("arguments", [("compare", "x", "y"), ("ppl", "--baseline", "no-such")])
    def test_a_run_that_does_not_exist(self, cli, arguments):
        done = cli(*arguments)
        assert done.code == 2
        assert "Next:" in done.said
