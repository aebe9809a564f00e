"""The command line, in a process of its own or in this one."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from engines import tiny

from evalsuite.cli.app import main

ROOT = Path(__file__).resolve().parents[2]
WORDS = "It was a bright cold day in April, and the clocks were striking thirteen. "


def environment(**changes):
    """Two threads at most, no hub, no terminal."""
    kept = {k: v for k, v in os.environ.items() if k not in ("HLWQ_EVAL_DATA", "FORCE_COLOR")}
    return kept | {
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": str(ROOT)
    } | changes  # fmt: skip


def command(*arguments):
    return [sys.executable, "-c", "from evalsuite.cli.app import main; main()", *map(str, arguments)]


@pytest.fixture
def shell(tmp_path):
    """Run `hlwq-eval` in a process of its own, in an empty folder."""

    def run(*arguments, **changes):
        return subprocess.run(
            command(*arguments), cwd=tmp_path, env=environment(**changes), capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip

    return run


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Run `hlwq-eval` in this process (its imports are paid for once), in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("HLWQ_EVAL_DATA", raising=False)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hlwq-eval", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return SimpleNamespace(code=stop.value.code, out=out, err=err, said=re.sub(r"\s+", " ", err))

    return run


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Checkpoints that run in no time: a Llama, the same in bfloat16, and one of another seed."""
    root = tmp_path_factory.mktemp("models")
    tiny.write(tiny.llama(), root / "base")
    tiny.write(tiny.llama(initializer_range=0.21), root / "other")
    return root


@pytest.fixture
def text(tmp_path):
    """A text of 25 windows under `SMALL`."""
    path = tmp_path / "text.txt"
    path.write_text((WORDS * 20)[:1400])
    return path
