"""An experiment file on a real Ray cluster, by the command that a user gives."""

import json
import sys

import pytest
from engines import tiny

from evalsuite.cli.app import main
from evalsuite.store.runs import RunStore, load_record

EVALUATION = """
question = "Is this a test?"
baseline = "{source}"
candidate = "{source}"
corpus = "{text}"

[[steps]]
command = "ppl"
models = ["baseline"]
context = 64
stride = 32
limit = 4

[[steps]]
command = "speed"
models = ["baseline"]
modes = ["eager"]
input_len = 8
output_len = 4
repeats = 1
warmup = 0
"""


@pytest.mark.xdist_group("ray")
def test_an_evaluation_runs_on_a_cluster(pair, tmp_path, monkeypatch, capsys):
    text, file = tmp_path / "text.txt", tmp_path / "small.toml"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    source = tiny.write(tiny.llama(hidden_size=64), tmp_path / "tiny")
    file.write_text(EVALUATION.format(source=source, text=text))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(
        sys, "argv",
        [
            "hlwq-eval", "run", str(file), "--cluster", pair, "--gpu-kind", "pair", "--workers", "1", "--json",
            "--work", str(tmp_path / "work"), "--results", str(tmp_path / "results"),
        ],
    )  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    assert stop.value.code == 0, err
    assert [(step["step"], step["status"]) for step in json.loads(out)] == [("ppl", "ok"), ("speed", "ok")]
    store = RunStore(tmp_path / "results")
    (score,), (cell,) = (map(load_record, store.finished(kind)) for kind in ("ppl", "speed"))
    assert [worker.windows for worker in score.workers] == [4]
    assert cell.status == "ok", cell.error
