"""The README's tables come from the records, and its commands exist."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

from evalsuite.report.readme import render

README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^hlwq-eval (.+?)(?: +#.*)?$", README, re.M)
RUN_HERE = [c for c in COMMANDS if "--explain" in c]


def test_tables_are_those_of_the_records():
    assert render(README, ROOT / "results") == README, "run: python -m evalsuite.report.readme"


def test_there_are_commands_to_try():
    assert len(COMMANDS) >= 8
    assert len(RUN_HERE) == 2


def hlwq_eval(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "evalsuite", *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"COLUMNS": "200", "PYTHONPATH": str(ROOT)},
    ).stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_exist(command: str):
    """Every flag that the README uses is one that the command's help names."""
    names, arguments = shlex.split(command)[:1], shlex.split(command)[1:]
    if names == ["cache"]:
        names.append(arguments.pop(0))
    shown = hlwq_eval(*names, "--help")
    for flag in (a for a in arguments if a.startswith("--")):
        assert flag in shown


@pytest.mark.parametrize("command", RUN_HERE)
def test_explanations_run(command: str):
    assert "WikiText-2 test" in hlwq_eval(*shlex.split(command))


def test_no_example_mentions_a_make_target_that_is_missing():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M)
