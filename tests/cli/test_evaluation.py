"""`hlwq-eval run` on an evaluation: its plan, its steps, what is done again and what a failure leaves."""

import json
from pathlib import Path

import pytest
from engines import tiny

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    path for path in (ROOT / "experiments").glob("*.toml") if "[[steps]]" in path.read_text(encoding="utf-8")
)
SMALL = """
question = "Is this a test?"
baseline = "{source}"
corpus = "text.txt"

[[steps]]
command = "quantize"
recipe = {{ method = "rtn", group_size = 32 }}

[[steps]]
command = "ppl"
context = 64
stride = 32
limit = 12
{more}
"""
FOOTPRINT = """
[[steps]]
command = "footprint"
models = ["candidate"]
input_len = 8
output_len = 4
idle = 0.1
"""


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tiny.write(tiny.llama(hidden_size=64), tmp_path_factory.mktemp("evaluation") / "tiny")


@pytest.fixture
def file(base, tmp_path, text):
    path = tmp_path / "small.toml"

    def write(more="", **changes):
        path.write_text(SMALL.format(**{"source": base, "more": more} | changes))
        return path

    return write


def kinds(results):
    return sorted(path.parent.name.partition("-")[0] for path in Path(results).glob("*/*/run.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_evaluation_dry_runs(path, cli, tmp_path, monkeypatch):
    monkeypatch.setattr("evalsuite.telemetry.machine.read_gpus", lambda: ((), None, None))
    monkeypatch.chdir(ROOT)
    done = cli("run", path, "--dry-run", "--json", "--results", tmp_path / "r", "--work", tmp_path / "w")
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    assert plan["models"]
    assert all(cell["weights_bytes"] or cell["step"] == "quantize" for cell in plan["cells"])
    assert not any(cell["done"] for cell in plan["cells"])
    assert not any(tmp_path.iterdir())  # it says what it would do, and does nothing
    if path.stem == "qwopus_35b_a3b":
        assert [model["origin"] for model in plan["models"]] == ["geometry", "geometry"]
        assert plan["models"][0]["weights_bytes"] == pytest.approx(19.4e9, rel=0.01)
        assert plan["models"][1]["weights_bytes"] == pytest.approx(69.3e9, rel=0.01)
        assert "CUDA graphs need a GPU" in done.said
    if path.stem.startswith("geometry"):
        assert all(cell["refused"] for cell in plan["cells"])
        assert "There is no GPU 0" in done.said


def test_an_evaluation_runs_and_only_what_is_missing_runs_again(cli, file, tmp_path):
    path = file(FOOTPRINT)
    planned = cli("run", path, "--dry-run", "--json")
    assert planned.code == 0, planned.err
    plan = json.loads(planned.out)
    assert [cell["step"] for cell in plan["cells"]] == ["quantize", "ppl", "ppl", "footprint"]
    assert plan["models"][1]["origin"] == "made"
    assert plan["models"][1]["weights_bytes"] > 0
    assert "12 windows of tiny" in planned.said
    assert not (tmp_path / "build").exists()

    done = cli("run", path, "--json")
    assert done.code == 0, done.err
    steps = json.loads(done.out)
    assert [(step["step"], step["status"]) for step in steps] == [
        ("quantize", "ok"), ("ppl", "ok"), ("footprint", "ok"),
    ]  # fmt: skip
    assert steps[1]["document"]["comparison"]["results"]["divergence"]["mean"] > 0
    assert kinds("results") == ["compare", "footprint", "ppl", "ppl", "quantize"]
    made = json.loads((tmp_path / steps[0]["document"]["path"] / "run.json").read_text())
    assert made["results"]["bytes_after"] == pytest.approx(plan["models"][1]["weights_bytes"], rel=0.01)
    assert "| quantize | ok |" in (tmp_path / "results" / "small.md").read_text()

    records = sorted((tmp_path / "results").rglob("run.json"))
    again = cli("run", path)
    assert again.code == 0, again.err
    assert sorted((tmp_path / "results").rglob("run.json")) == records
    for said in ("was made before", "scored before", "was watched before"):
        assert said in again.said
    after = json.loads(cli("run", path, "--dry-run", "--json").out)
    assert all(cell["done"] for cell in after["cells"])


def test_parts_of_it_run(cli, file):
    done = cli("run", file(FOOTPRINT), "--only", "quantize,ppl", "--limit", "3", "--json")
    assert done.code == 0, done.err
    assert [step["step"] for step in json.loads(done.out)] == ["quantize", "ppl"]
    assert json.loads(done.out)[1]["document"]["results"]["windows"] == 3
    assert cli("run", file(), "--only", "quick").code == 2


def test_a_candidate_that_was_not_made_is_asked_for(cli, file, tmp_path):
    done = cli("run", file(FOOTPRINT), "--only", "footprint")
    assert done.code == 1
    assert "has not been made" in done.said
    assert "run the step that quantizes" in done.said
    assert kinds("results") == []


def test_a_step_that_fails_is_shown_and_the_others_go_on(cli, file, tmp_path):
    footprint = FOOTPRINT.replace("idle = 0.1", "idle = 0.1\nmoe_expert_cache_size = 8")
    dense = cli(
        "run", file(footprint + FOOTPRINT.replace("[[steps]]", '[[steps]]\nname = "plain"')), "--json"
    )
    assert dense.code == 1
    steps = {step["step"]: step for step in json.loads(dense.out)}
    assert steps["footprint"]["status"] == "failed"
    assert "has no experts" in steps["footprint"]["why"]
    assert steps["plain"]["status"] == "ok"
    assert "1 of 4 steps failed: footprint" in dense.said
    assert "| footprint | failed |" in (tmp_path / "results" / "small.md").read_text()


def test_what_this_machine_cannot_do_is_refused_before_it_loads(cli, file, monkeypatch):
    monkeypatch.setattr("evalsuite.telemetry.machine.read_gpus", lambda: ((), None, None))
    speed = '[[steps]]\ncommand = "speed"\nmodes = "graphs"\ninput_len = 8\noutput_len = 4\n'
    done = cli("run", file(speed), "--json", "--limit", 3)
    assert done.code == 1
    step = json.loads(done.out)[-1]
    assert (step["status"], step["seconds"]) == ("refused", 0)
    assert "CUDA graphs need a GPU" in step["why"]


def test_a_candidate_is_scored_though_its_baseline_fails(cli, file, tmp_path, models):
    """A model of 2,048 GB fails where the small one would be scored."""
    text = SMALL.partition("[[steps]]")[0].format(source="no/where") + f'candidate = "{models / "base"}"\n'
    ppl = '[[steps]]\ncommand = "ppl"\ncontext = 64\nstride = 32\nlimit = 3\n'
    path = tmp_path / "pair.toml"
    path.write_text(text + ppl)
    done = cli("run", path, "--json")
    assert done.code == 1
    assert "is scored all the same" in done.said
    assert kinds("results") == ["ppl"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ('[[steps]]\ncommand = "check"\nclaims = "none.toml"', "none.toml"),
        ('[[steps]]\ncommand = "footprint"\ngpus = [0, 1]', "--tensor-parallel-size is 1"),
        ('[[steps]]\ncommand = "cache"\ngeometry = "x"', "belong to a prediction"),
    ],
)
def test_bad_words_are_refused_before_anything_runs(more, said, cli, file, tmp_path):
    done = cli("run", file(more))
    assert done.code == 2
    assert said in done.said
    assert not (tmp_path / "results").exists()


def test_a_disk_that_is_too_small_is_refused_before_anything_runs(cli, file, tmp_path, monkeypatch):
    monkeypatch.setattr("evalsuite.experiment.models.free_disk_bytes", lambda path: 1000)
    done = cli("run", file())
    assert done.code == 2
    assert "its disk has 1 kB free" in done.said
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_the_two_minute_experiment(cli, tmp_path, monkeypatch):
    """Every kind of step, for real."""
    text = (ROOT / "experiments" / "demo.toml").read_text()
    path = tmp_path / "demo.toml"
    path.write_text(
        text.replace("experiments/", f"{ROOT}/experiments/").replace("repeats = 3", "repeats = 2")
    )
    done = cli("run", path, "--limit", 8, "--json")
    assert done.code == 0, done.err
    assert {step["status"] for step in json.loads(done.out)} == {"ok"}
    assert kinds("results") == ["compare", "footprint", "ppl", "ppl", "quantize", *["speed"] * 4]
    results = tmp_path / "results"
    for file in ("demo.md", "report/REPORT.md", "report/report.html"):
        assert (results / file).stat().st_size > 300
    assert list(results.glob("demo-rtn-int4-*/MODEL_CARD.md"))
    assert list(results.glob("demo-rtn-int4-*/cache/simulation.md"))
