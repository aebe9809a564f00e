"""Sweeps over the built-in model's name, run by a scripted engine."""

import json
from pathlib import Path

import pytest

from evalsuite.core.bandwidth import Bandwidth
from evalsuite.core.spec import Serving, Workload
from evalsuite.core.sweep import Axes, cells
from evalsuite.data.corpora import load_corpus
from evalsuite.engines.process import ProcessGenerator
from evalsuite.run import speed
from evalsuite.run.subject import prepare
from evalsuite.store.runs import RunStore

ROOT = Path(__file__).resolve().parents[2]
BANDWIDTH = Bandwidth(device="cpu", copy_bytes_per_s=1e10, matrix_flop_per_s=1e11)


class Watcher:
    """Notes what a sweep says."""

    def __init__(self):
        self.phases, self.cells = [], []

    def phase(self, text):
        self.phases.append(text)

    def cell(self, done, total, text):
        self.cells.append((done, total, text))


class Bench:
    """A results folder, a scripted engine and small cells."""

    def __init__(self, folder):
        self.folder, self.opened = folder, []
        self.script = folder / "script.json"
        self.text = folder / "text.txt"
        self.text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
        self.workload = Workload(
            corpus=str(self.text), input_len=8, output_len=4, repeats=2, warmups=1, timeout_s=30.0
        )
        self.play()

    def play(self, **script):
        self.subject = prepare("demo", Serving(), self.workload, load_corpus(str(self.text)))
        self.script.write_text(json.dumps({"facts": {"fingerprint": self.subject.fingerprint}} | script))

    def open(self, model, serving, log, load_timeout_s):
        engine = ProcessGenerator(f"fake:{self.script}", serving, log, load_timeout_s)
        self.opened.append(engine)
        return engine

    def cells(self, **axes):
        return cells(
            Axes(**{"models": ("demo",), "cache_sizes": (8, 16, None)} | axes), Serving(), self.workload
        )

    def plan(self, **changes):
        self.watcher = Watcher()
        settings = {
            "store": RunStore(self.folder / "results"), "subjects": {"demo": self.subject}, "seed": 0,
            "fresh": False, "progress": self.watcher, "opener": self.open,
        }  # fmt: skip
        return speed.Plan(**settings | changes)

    def run(self, chosen=None, **changes):
        self.opened.clear()
        found = speed.run_sweep(self.plan(**changes), chosen or self.cells())
        assert all(engine._members() == [] for engine in self.opened)
        return found


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setenv("HLWQ_EVAL_FAKE_ENGINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(speed, "measure_bandwidth", lambda gpu: BANDWIDTH)
    return Bench(tmp_path)
