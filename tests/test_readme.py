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


@pytest.fixture
def kept_records(tmp_path):
    """The records that belong to the project, without those that somebody's own runs have added."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "results/*/run.json"],
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout: it cannot be told which records belong to the project")
    for folder in {(ROOT / name).parent for name in listed.stdout.splitlines()}:
        (tmp_path / folder.parent.name).mkdir(exist_ok=True)
        (tmp_path / folder.parent.name / folder.name).symlink_to(folder)
    return tmp_path


def test_tables_are_those_of_the_records(kept_records):
    assert render(README, kept_records, ROOT) == README, "run: python -m evalsuite.report.readme"


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
