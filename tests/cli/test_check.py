"""`hlwq-eval check` as a user meets it."""

import json
import shutil
import subprocess
import sys

import pytest

from cli.conftest import ROOT, environment

CLAIMS = ROOT / "experiments" / "claims" / "qwopus_35b_a3b.toml"
GOOD = """\
[card]
title = "[b]T[/b]"
source = "here"

[models.m]
title = "M"
names = ["demo"]

[[claim]]
id = "tokens"
where = "a table"
quote = "25,600"
model = "m"
metric = "scored_tokens"
value = 25_600
windows = 100
"""


def test_the_shipped_claims_need_no_records_no_gpu_and_no_heavy_library(tmp_path):
    code = (
        "import sys\nfrom evalsuite.cli.app import main\n"
        "try:\n    main()\nfinally:\n"
        "    print('heavy:', sorted({'torch', 'transformers', 'vllm'} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "check", str(CLAIMS), "--json"],
        env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "heavy: []" in done.stderr
    counts = json.loads(done.stdout)["counts"]
    assert counts["impossible"] == 4
    assert counts["fails"] == 2
    assert counts["contradicted"] > 20
    assert "what does not stand" in done.stderr
    assert "No records in results" in done.stderr


def test_exit_codes_follow_the_verdicts_asked_for(cli):
    assert cli("check", CLAIMS).code == 1
    assert cli("check", CLAIMS, "--fail-on", "none").code == 0
    assert cli("check", CLAIMS, "--fail-on", "not measured").code == 1
    unknown = cli("check", CLAIMS, "--fail-on", "wrong")
    assert unknown.code == 2
    assert "knows no verdict 'wrong'" in unknown.err


def test_claims_that_hold_pass(cli, tmp_path):
    path = tmp_path / "claims.toml"
    path.write_text(GOOD)
    done = cli("check", path)
    assert done.code == 0
    assert "1 claims: 1 holds." in done.out
    assert cli("check", path, "--fail-on", "not measured").code == 0


def test_brackets_in_a_title_are_no_markup(cli, tmp_path):
    path = tmp_path / "claims.toml"
    path.write_text(GOOD.replace("25_600", "25_601") + GOOD.partition("[[claim]]")[2].join(("[[claim]]", "")).replace(
        '"tokens"', '"more"').replace("= 100", "= 200").replace("25_600", "51_200"))  # fmt: skip
    done = cli("check", path)
    assert done.code == 1
    assert "[b]T[/b]: what does not stand" in done.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "No claims file was named"),
        (("none.toml",), "cannot be read"),
        (("--init", "none.md"), "cannot be read as text"),
        (("claims.toml", "--init", "card.md"), "checks none"),
    ],
)
def test_wrong_usage_is_refused(cli, arguments, said):
    done = cli("check", *arguments)
    assert done.code == 2
    assert said in done.said


def test_damaged_records_are_left_out_by_name(cli, tmp_path):
    path = tmp_path / "claims.toml"
    path.write_text(GOOD)
    run = next((ROOT / "results" / "demo").glob("ppl-*"))
    for name, text in (("ppl-a-1", "{"), ("ppl-b-1", '{"schema_version": 99}')):
        folder = tmp_path / "results" / "demo" / name
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(text)
    shutil.copytree(run, tmp_path / "results" / "demo" / run.name)
    done = cli("check", path, "--json")
    assert done.code == 0
    skipped = json.loads(done.out)["skipped_records"]
    assert len(skipped) == 2
    assert "not valid JSON" in " ".join(skipped)
    assert "record schema 99" in " ".join(skipped)
    assert done.said.count("left out:") == 2


def test_a_draft_is_written_once_and_checks(cli, tmp_path):
    (tmp_path / "card.md").write_text("# T\n\n| Model | PPL | x |\n|---|---|---|\n| A | 6.5 | 3 |\n")
    done = cli("check", "--init", "card.md", "--json")
    assert done.code == 0
    assert json.loads(done.out) == {"path": "claims.toml", "claims": 1, "comments": 1}
    assert "hlwq-eval check claims.toml" in done.said
    assert cli("check", "claims.toml").code == 0
    again = cli("check", "--init", "card.md")
    assert again.code == 2
    assert "claims.toml exists" in again.said
