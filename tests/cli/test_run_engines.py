"""`hlwq-eval run`: an ablation through both engines, and by several protocols."""

import json
from dataclasses import replace

import pytest
from engines import tiny
from vllm_cpu.present import ENVIRONMENT, needs_vllm

import evalsuite.run.perplexity
from cli.test_run import TWO_ARMS, kinds
from evalsuite.core.errors import ModelError, StorageError
from evalsuite.engines.scorers import ScorerChoice
from evalsuite.experiment import ablation_run
from evalsuite.experiment.ablation import Ablation
from evalsuite.experiment.load import load_experiment
from evalsuite.run.perplexity import run_compare

BOTH = 'engine = ["torch", "vllm"]\n'
ARMS = ["BF16", "RTN INT4", "HLWQ-Q5, decoded"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.write(tiny.llama(hidden_size=64), tmp_path_factory.mktemp("engines") / "tiny")


@pytest.fixture
def experiment(base, tmp_path, text):
    path = tmp_path / "engines.toml"
    path.write_text('dtype = "bfloat16"\n' + BOTH + TWO_ARMS.format(source=base))
    return path


@pytest.fixture
def refused(monkeypatch):
    """Torch in float32 stands in for vLLM, and refuses the models whose names hold one of these words."""
    words: list[str] = []
    module, real = evalsuite.run.perplexity, evalsuite.run.perplexity.open_scorer

    def choose(spec, _):
        return ScorerChoice(
            "vllm" if spec.engine == "vllm" else "torch", "asked for", {"engine": spec.engine}
        )

    def open_scorer(choice, spec, checkpoint):
        if choice.engine == "torch":
            return real(choice, spec, checkpoint)
        if any(word in checkpoint.name for word in words):
            raise ModelError(f"Loading {checkpoint.name} failed in vLLM.", cause="it has no kernel for that.")
        return real(replace(choice, engine="torch"), spec.model_copy(update={"dtype": "float32"}), checkpoint)

    monkeypatch.setattr(module, "check_scorer", lambda _: None)
    monkeypatch.setattr(module, "choose_scorer", choose)
    monkeypatch.setattr(module, "open_scorer", open_scorer)
    return words


def tables(path):
    """Rows of each table of a Markdown file, as lists of cells."""
    found = []
    for line in path.read_text().splitlines():
        if line.startswith("# "):
            found.append([])
        elif line.startswith("| ") and "---" not in line:
            line = line.replace(r"\*", "*")
            found[-1].append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


def test_both_engines_side_by_side(cli, experiment, tmp_path, refused):
    done = cli("run", experiment)
    assert done.code == 0, done.err
    assert kinds("results") == ["compare"] * (2 * 2 + 3) + ["ppl"] * 6 + ["quantize"] * 2
    assert done.err.count(": quantizing") == 2, "both engines read the same folder"
    assert not list((tmp_path / "build" / "experiments").iterdir())
    arms, engines = tables(tmp_path / "results" / "engines.md")
    assert [row[:2] for row in arms[1:]] == [[arm, engine] for arm in ARMS for engine in ("torch", "vllm")]
    assert engines[0][:4] == ["arm", "PPL, torch ↓", "PPL, vllm ↓", "Δ ln PPL"]
    assert [row[0] for row in engines[1:]] == ARMS
    assert all("[" in row[3] for row in engines[1:])

    before = sorted((tmp_path / "results").rglob("*"))
    again = cli("run", experiment, "--json")
    assert sorted((tmp_path / "results").rglob("*")) == before
    assert "scoring" not in again.err
    document = json.loads(again.out)
    by_arm = {(arm["name"], arm["engine"]): arm for arm in document["arms"]}
    for pair in document["engines"]:
        first, second = (by_arm[pair["name"], engine]["perplexity"] for engine in ("torch", "vllm"))
        assert pair["compared"]["baseline_perplexity"] == first["perplexity"]
        assert pair["compared"]["candidate_perplexity"] == second["perplexity"]
        assert 0 < pair["compared"]["divergence"]["mean"] < 0.01
        assert (pair["baseline_engine"], pair["candidate_engine"]) == ("torch", "vllm")
    assert all(arm["done"] for arm in json.loads(cli("run", experiment, "--dry-run", "--json").out)["arms"])


def test_states_that_are_gone_do_not_compare_the_engines_again(cli, experiment, tmp_path, refused):
    assert cli("run", experiment).code == 0
    for path in [*(tmp_path / "results").rglob("hidden.npy"), *(tmp_path / "results").rglob("head.*")]:
        path.unlink()
    again = cli("run", experiment)
    assert again.code == 0
    assert "comparing" not in again.err
    assert "scoring" not in again.err


def test_an_arm_that_one_engine_cannot_run_fails_alone(cli, experiment, tmp_path, refused):
    refused.append("rtn-int4")
    done = cli("run", experiment)
    assert done.code == 1
    assert "These have no result: RTN INT4 (card-1155*, vllm)." in done.said
    arms, engines, reasons = tables(tmp_path / "results" / "engines.md")
    assert [row[:2] for row in arms if "failed" in row] == [["RTN INT4", "vllm"]]
    _, (what, why) = reasons
    assert what == "RTN INT4 (card-1155*, vllm)"
    assert why.endswith("failed in vLLM: it has no kernel for that.")
    assert [row[0] for row in engines if "failed" in row] == ["RTN INT4"]
    refused.clear()
    mended = cli("run", experiment)
    assert mended.code == 0, mended.err
    assert "RTN INT4, card-1155*, vllm: scoring" in mended.err
    assert "torch: scoring" not in mended.err
    assert "HLWQ-Q5, decoded, card-1155*, vllm: scoring" not in mended.err
    assert "failed" not in (tmp_path / "results" / "engines.md").read_text()


def test_an_arm_that_cannot_be_quantized_is_tried_once(cli, experiment, refused, monkeypatch):
    tried = []

    def quantize(*_):
        tried.append(None)
        raise ModelError("No rows of this width.")

    monkeypatch.setattr(ablation_run, "run_quantize", quantize)
    done = cli("run", experiment)
    assert done.code == 1
    assert all(f"RTN INT4 (card-1155*, {engine})" in done.said for engine in ("torch", "vllm"))
    assert len(tried) == len(ARMS) - 1


def test_engines_that_cannot_be_compared_are_an_error(cli, experiment, tmp_path, refused, monkeypatch):
    def compare(baseline, candidate, *rest):
        if baseline.parent == candidate.parent:  # one arm through both engines
            raise StorageError("The disk is full.")
        return run_compare(baseline, candidate, *rest)

    monkeypatch.setattr(ablation_run, "run_compare", compare)
    done = cli("run", experiment)
    assert done.code == 1
    assert all(f"{arm} (card-1155*: engine against engine)" in done.said for arm in ARMS)
    arms, engines, reasons = tables(tmp_path / "results" / "engines.md")
    assert not [row for row in arms if "failed" in row]
    assert {cell for row in engines[1:] for cell in row[3:]} == {"—"}
    assert [row[-1] for row in reasons[1:]] == ["The disk is full."] * len(ARMS)


def test_an_engine_that_cannot_run_the_baseline_leaves_the_other_alone(cli, experiment, tmp_path, refused):
    refused.append("tiny")
    done = cli("run", experiment)
    assert done.code == 1
    assert all(f"{arm} (card-1155*, vllm)" in done.said for arm in ARMS)
    *_, reasons = tables(tmp_path / "results" / "engines.md")
    assert ["RTN INT4 (card-1155*, vllm)", "BF16 has no result to compare with"] in reasons
    experiment.write_text(experiment.read_text().replace(BOTH, 'engine = "vllm"\n'))
    alone = cli("run", experiment)
    assert alone.code == 2, "nothing can be said, and the error is the baseline's"
    assert "it has no kernel for that" in alone.said


def test_several_protocols_have_tables_of_their_own(cli, experiment, tmp_path, refused):
    text = experiment.read_text().replace("limit = 12", 'limit = 12\nprotocol = ["card-1155", "gptq"]')
    experiment.write_text(text.replace("stride = 32\n", "").replace("context = 64", "context = 256"))
    done = cli("run", experiment)
    assert done.code == 0, done.err
    assert done.err.count(": quantizing") == 2
    shown = (tmp_path / "results" / "engines.md").read_text()
    assert [line for line in shown.splitlines() if line.startswith("# ")] == [
        "# Is this a test? (card-1155*)", "# Is this a test? (card-1155*): vllm against torch",
        "# Is this a test? (gptq*)", "# Is this a test? (gptq*): vllm against torch",
    ]  # fmt: skip


def test_one_value_is_a_list_of_one(experiment):
    experiment.write_text(experiment.read_text().replace(BOTH, 'engine = "vllm"\n'))
    one = load_experiment(experiment)
    assert isinstance(one, Ablation)
    assert [str(setting) for setting in one.settings] == ["card-1155*, vllm"]


@needs_vllm
@pytest.mark.xdist_group("vllm scorer")
def test_the_real_vllm_reads_the_same_folders(cli, experiment, tmp_path, monkeypatch):
    """Without the INT4 arm, for whose kernel few CPUs have the instructions."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    before, _, after = experiment.read_text().partition('[[arms]]\nname = "RTN INT4"')
    experiment.write_text(before + after[after.index("[[arms]]") :])
    done = cli("run", experiment, "--json")
    assert done.code == 0, done.err
    pairs = json.loads(done.out)["engines"]
    assert [pair["name"] for pair in pairs] == [ARMS[0], ARMS[2]]
    for pair in pairs:
        assert abs(pair["compared"]["delta_ln_ppl"]) < 0.01
        assert pair["compared"]["divergence"]["mean"] < 0.01
