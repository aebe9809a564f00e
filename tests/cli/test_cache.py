"""`cache trace` and `cache simulate`, used as a user would."""

import json
import shutil

import numpy as np
import pytest
from engines import tiny
from experts.traces import trace

from evalsuite.experts.trace import load_trace

SMALL = ("--input-len", 20, "--output-len", 4, "--requests", 2, "--dtype", "float32")


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    root = tmp_path_factory.mktemp("moe")
    tiny.write(tiny.qwen3_5_moe(), root / "moe")
    tiny.write(tiny.llama(), root / "dense")
    return root


@pytest.fixture
def traced(tmp_path):
    """A folder with a trace that no model had to make."""
    (tmp_path / "traced").mkdir()
    trace().save(tmp_path / "traced" / "trace.parquet")
    return tmp_path / "traced"


class TestTrace:
    def test_one_command_gives_a_trace_and_a_picture(self, cli, moe, text, tmp_path):
        done = cli("cache", "trace", moe / "moe", "out", "--corpus", text, *SMALL, "--json")
        assert done.code == 0
        document = json.loads(done.out)
        found = load_trace(tmp_path / "out" / "trace.parquet")
        assert document["fingerprint"] == found.facts.fingerprint
        assert document["path"] == "out/trace.parquet"
        assert (found.tokens("prefill"), found.tokens("decode")) == (40, 6)
        assert (found.facts.model, found.facts.corpus, found.facts.dummy) == ("moe", "file:text.txt", False)
        assert found.facts.geometry.expert_bytes == 4 * 3 * 32 * 16
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
            "expert_use.png", "expert_use.svg", "trace.parquet",
        ]  # fmt: skip
        assert "2 of 2 requests" in done.said

    def test_the_same_request_gives_the_same_trace_and_another_seed_another(self, cli, moe, text, tmp_path):
        for out, seed in (("a", 0), ("b", 0), ("c", 1)):
            assert cli("cache", "trace", moe / "moe", out, "--corpus", text, *SMALL, "--seed", seed).code == 0
        a, b, c = (load_trace(tmp_path / name / "trace.parquet") for name in "abc")
        assert a.facts == b.facts
        np.testing.assert_array_equal(a.chosen, b.chosen)
        assert a.facts.prompts_sha256 != c.facts.prompts_sha256

    def test_requests_at_once_share_their_steps(self, cli, moe, text, tmp_path):
        done = cli("cache", "trace", moe / "moe", "out", "--corpus", text, *SMALL, "--concurrency", 2)
        assert done.code == 0
        found = load_trace(tmp_path / "out" / "trace.parquet")
        assert found.step.max() == 3
        assert found.request[found.step == 1].tolist() == [0, 1]

    def test_a_trace_is_replaced_only_when_asked(self, cli, moe, text, traced):
        before = (traced / "trace.parquet").read_bytes()
        done = cli("cache", "trace", moe / "moe", traced, "--corpus", text, *SMALL)
        assert done.code == 2
        assert "exists" in done.said
        assert "--fresh" in done.said
        assert (traced / "trace.parquet").read_bytes() == before
        assert cli("cache", "trace", moe / "moe", traced, "--corpus", text, *SMALL, "--fresh").code == 0
        assert load_trace(traced / "trace.parquet").facts.model == "moe"

    @pytest.mark.parametrize(
        ("arguments", "named", "step"),
        [
            (["--input-len", 500, "--output-len", 13], "context of 512 tokens", "smaller --input-len"),
            (["--requests", 2000], "too few for 2000 different prompts", "longer text"),
            (["--requests", 3, "--concurrency", 2], "3 requests cannot be sent 2 at a time", "multiple"),
            (["--load-format", "dummy"], "real weights only", "--engine vllm"),
            (["--engine", "vllm", "--concurrency", 2], "one request at a time", "--engine torch"),
            (["--engine", "vllm", "--gpus", 0], "first GPU it sees", "CUDA_VISIBLE_DEVICES"),
            (["--gpus", "0,1"], "--gpus 0,1", "--gpus 0"),
            (["--gpus", 77], "no GPU 77", "doctor"),
            (["--corpus", "missing.txt"], "missing.txt", "choose wikitext-2"),
            (["--input-len", 0], "--input-len", "--help"),
            (["--output-len", 1], "--output-len", "--help"),
            (["--engine", "magic"], "--engine", "torch"),
        ],
        ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
    )
    def test_bad_flags_are_refused_before_a_model_loads(
        self, cli, moe, text, arguments, named, step, monkeypatch, tmp_path
    ):
        def refuse(*arguments, **options):
            raise AssertionError("a model was loaded")

        monkeypatch.setattr("evalsuite.engines.torch_routing.load_model", refuse)
        done = cli("cache", "trace", moe / "moe", "out", "--corpus", text, *SMALL, *arguments)
        assert done.code == 2
        assert named in done.said
        assert step in done.said
        assert not (tmp_path / "out" / "trace.parquet").exists()

    def test_a_dense_model_has_nothing_to_cache_whatever_the_text(self, cli, moe, tmp_path):
        done = cli("cache", "trace", moe / "dense", "out", "--corpus", "missing.txt", *SMALL)
        assert done.code == 2
        assert "dense is dense" in done.said
        assert "nothing to cache" in done.said
        assert not (tmp_path / "out").exists()

    def test_a_gguf_file_is_refused(self, cli, text, tmp_path):
        (tmp_path / "some.gguf").write_bytes(b"GGUF")
        done = cli("cache", "trace", "some.gguf", "out", "--corpus", text, *SMALL)
        assert done.code == 2
        assert "some.gguf is a GGUF file" in done.said
        assert "safetensors" in done.said

    def test_a_folder_that_cannot_be_made(self, cli, moe, text):
        done = cli("cache", "trace", moe / "moe", text / "out", "--corpus", text, *SMALL)
        assert done.code == 1
        assert "a part of that path is a file" in done.said
        assert "another folder" in done.said


class TestSimulate:
    def test_one_command_gives_tables_pictures_and_a_document(self, cli, traced):
        done = cli(
            "cache", "simulate", traced, "--sizes", "2,8,all", "--policies", "lru,belady", "--gpu",
            "rtx-4090,h100", "--context", 50, "--json",
        )  # fmt: skip
        assert done.code == 0
        document = json.loads(done.out)
        assert document == json.loads((traced / "simulation.json").read_text())
        assert len(document["cells"]) == 3 * 2 * 3
        assert {one["gpu"] for one in document["predictions"]} == {"rtx-4090", "h100"}
        assert {one["routing"] for one in document["predictions"]} == {"uniform", "trace, lru"}
        markdown = (traced / "simulation.md").read_text()
        for title in ("Expert cache of demo, simulated", "By layer: lru, decode", "GPU requirements of demo"):
            assert f"## {title}" in markdown
        heading = markdown.partition("## GPU requirements of demo")[2].split("\n")[2]
        assert heading.count("(derived)") >= 3  # of whole columns it is said once
        for picture in ("hit_rates", "expert_use", "predicted_speeds"):
            assert (traced / f"{picture}.png").stat().st_size > 10_000

    def test_results_go_where_they_are_asked_for(self, cli, traced, tmp_path):
        done = cli("cache", "simulate", traced / "trace.parquet", "--sizes", 4, "--results", "deep/er")
        assert done.code == 0
        assert [p.name for p in traced.iterdir()] == ["trace.parquet"]
        assert (tmp_path / "deep" / "er" / "simulation.md").is_file()
        assert not (tmp_path / "deep" / "er" / "predicted_speeds.png").exists()

    def test_more_than_all_experts_is_all_and_said_so(self, cli, traced):
        done = cli("cache", "simulate", traced, "--sizes", "99,all", "--policies", "lru", "--json")
        assert done.code == 0
        assert "a cache of 99 for 16 experts a layer: every expert is resident" in done.said
        assert {cell["counters"]["size"] for cell in json.loads(done.out)["cells"]} == {16}

    def test_prediction_for_another_models_geometry(self, cli, traced, moe, tmp_path):
        (tmp_path / "shapes").mkdir()
        shutil.copy(moe / "moe" / "config.json", tmp_path / "shapes" / "config.json")
        done = cli(
            "cache", "simulate", traced, "--gpu", "a100", "--geometry", "shapes", "--context", 64,
            "--compute-ms", 10, "--transfer-gb-per-s", 20, "--sizes", 16, "--json",
        )  # fmt: skip
        assert done.code == 0
        document = json.loads(done.out)
        assert document["predicted_model"] == "shapes"
        assert [one["tokens_per_s"] for one in document["predictions"]] == pytest.approx([100.0, 100.0])
        assert "10 ms as measured" in done.said

    @pytest.mark.parametrize(
        ("arguments", "named", "step"),
        [
            (["--sizes", "0"], "--sizes 0 is not a list", "8,64,all"),
            (["--sizes", "8,-4"], "--sizes 8,-4 is not a list", "8,64,all"),
            (["--sizes", "eight"], "--sizes eight", "8,64,all"),
            (["--sizes", "²"], "--sizes ²", "8,64,all"),
            (["--sizes", ","], "--sizes ,", "8,64,all"),
            (["--policies", "lru,mru"], "No cache policy is called 'mru'", "belady"),
            (["--gpu", "rtx-9090"], "No GPU is called 'rtx-9090'", "rtx-4090"),
            (["--gpu", "h100,a100", "--compute-ms", 5], "is of one GPU", "one --gpu"),
            (["--gpu", "h100", "--compute-ms", -5], "--compute-ms -5", "positive"),
            (["--gpu", "h100", "--transfer-gb-per-s", "nan"], "--transfer-gb-per-s nan", "positive"),
            (["--geometry", "demo"], "belong to a prediction", "--gpu"),
            (["--gpu", "h100", "--geometry", "nothing"], "'nothing'", "Next:"),
            (["--gpu", "h100", "--context", 65], "context of 64 tokens", "--context 64"),
            (["--model", "demo"], "The trace is of demo (ffffffffffff), not of demo", "trace demo itself"),
        ],
        ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
    )
    def test_bad_flags(self, cli, traced, arguments, named, step):
        done = cli("cache", "simulate", traced, *arguments)
        assert done.code == 2
        assert named in done.said
        assert step in done.said
        assert [p.name for p in traced.iterdir()] == ["trace.parquet"]

    def test_a_dense_geometry_is_refused(self, cli, traced, moe):
        done = cli("cache", "simulate", traced, "--gpu", "h100", "--geometry", moe / "dense")
        assert done.code == 2
        assert "dense is dense" in done.said

    def test_a_geometry_that_is_no_configuration(self, cli, traced):
        done = cli("cache", "simulate", traced, "--gpu", "h100", "--geometry", "smollm2")
        assert done.code == 2
        assert "smollm2 is a GGUF file" in done.said
        assert "--load-format" not in done.said

    def test_a_missing_and_a_damaged_trace(self, cli, traced):
        assert cli("cache", "simulate", "nowhere").code == 2
        path = traced / "trace.parquet"
        path.write_bytes(path.read_bytes()[:-20])
        done = cli("cache", "simulate", traced)
        assert done.code == 1
        assert "damaged" in done.said
        assert "hlwq-eval cache trace" in done.said


def test_help_imports_no_heavy_library(shell):
    done = shell("cache", "simulate", "--help")
    assert done.returncode == 0
    assert "belady" in done.stdout
