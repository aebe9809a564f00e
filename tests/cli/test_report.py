"""`hlwq-eval report` from the outside: files, exit codes, refusals."""

import csv
import json
import re

import pandas as pd
import pytest
from report.record_files import copy_runs, machine, speed_record, store

FORMS = "md,csv,tex,json,png,svg"


@pytest.fixture
def results(tmp_path):
    copy_runs(tmp_path / "results", "demo/ppl-20261123T210622Z-*", "demo-rtn-int4-0ffffe92/*-20261123T*")
    return store(tmp_path / "results", speed_record())


def test_everything_it_writes(cli, results):
    done = cli("report", "--formats", FORMS)
    assert done.code == 0, done.err
    out = results / "report"
    text = (out / "REPORT.md").read_text()
    links = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert links
    assert all((out / link).is_file() for link in links)
    assert (
        len(links) == len(list((out / "figures").glob("*.png"))) == len(list((out / "figures").glob("*.svg")))
    )
    headline = next((out / "tables").glob("headline-builtin*.csv"))
    rows = list(csv.DictReader(headline.open()))
    assert [row["model"] for row in rows] == ["demo", "demo-rtn-int4-0ffffe92"]
    assert all((headline.with_suffix(form)).is_file() for form in (".tex", ".json"))
    assert len(pd.read_parquet(out / "runs.parquet")) == len(pd.read_csv(out / "runs.csv")) == 4
    harness = json.loads((out / "lm-eval" / "demo.json").read_text())
    assert harness["model_name"] == "demo"
    assert "4 runs" in done.said
    # what it wrote is no record: a second report sees the same runs
    assert "4 runs" in cli("report", "--formats", "md").said


def test_one_form_alone(cli, results, tmp_path):
    done = cli("report", "results", "--out", "there", "--formats", "tex", "--model", "demo")
    assert done.code == 0, done.err
    assert {path.suffix for path in (tmp_path / "there").rglob("*") if path.is_file()} == {".tex"}


def test_svg_alone_leaves_no_png(cli, results, tmp_path):
    assert cli("report", "--out", "there", "--formats", "md,svg").code == 0
    assert {path.suffix for path in (tmp_path / "there" / "figures").iterdir()} == {".svg"}
    assert ".svg)" in (tmp_path / "there" / "REPORT.md").read_text()


def test_json_is_one_document_and_tables_go_elsewhere(cli, results):
    done = cli("report", "--formats", "md", "--json")
    document = json.loads(done.out)
    assert {"title", "sections", "warnings", "runs", "written"} <= set(document)
    assert "Headline" in done.err


def test_a_damaged_record_is_said_and_written(cli, results):
    record = next(results.glob("m/*/run.json"))
    record.write_text(record.read_text()[:99])
    done = cli("report", "--formats", "md")
    assert done.code == 0
    assert "left out" in done.said
    assert record.parent.name in (results / "report" / "REPORT.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["nowhere"], "There is no folder nowhere"),
        (["--formats", "md,pdf"], "There is no format 'pdf'"),
        (["--model", "none"], "no finished run of none"),
        (["--fail-on", "ppl>+1%"], "there is one folder"),
        (["--diff"], "--diff compares two folders, and 1 were named"),
        (
            ["results", "results", "--diff", "--formats", "md"],
            "--formats and --claims are for the tables and pictures",
        ),
        (["results", "results", "--diff", "--fail-on", "ppl>1%"], "a rise or a fall"),
        (["results", "results", "--diff", "--fail-on", "error>+1%"], "looks at nothing"),
    ],
)
def test_what_is_refused(cli, results, arguments, why):
    done = cli("report", *arguments)
    assert done.code == 2
    assert why in done.said
    assert not (results / "report").exists(), "nothing was written"


def test_a_place_that_cannot_be_written(cli, results):
    record = next(results.glob("m/*/run.json"))
    done = cli("report", "--out", record / "below", "--formats", "md,png")
    assert done.code == 1
    assert "below" in done.said


def test_a_folder_that_is_named_twice_counts_once(cli, results):
    assert "4 runs" in cli("report", "results", "results/../results", "--formats", "md").said


def test_of_two_folders_the_newest_run_stands_in_the_tables(cli, tmp_path):
    old = speed_record(decode=50.0)
    new = speed_record(decode=80.0, stamp="20261102T000000Z", started="2026-11-02T00:00:00+00:00")
    store(tmp_path / "a", old)
    store(tmp_path / "b", new)
    for folders in (("a", "b"), ("b", "a")):
        assert cli("report", *folders, "--out", "there", "--formats", "md").code == 0
        text = (tmp_path / "there" / "REPORT.md").read_text()
        assert "80.0 ± 1.0" in text
        assert "50.0 ± 1.0" not in text


class TestDifference:
    def folders(self, tmp_path, decode, **changes):
        store(tmp_path / "old", speed_record())
        store(tmp_path / "new", speed_record(decode=decode, **changes))

    def test_a_crossed_limit_is_exit_1_and_said(self, cli, tmp_path):
        self.folders(tmp_path, 80.0)
        done = cli("report", "old", "new", "--diff", "--fail-on", "decode_tok_s<-5%", "--json")
        assert done.code == 1
        assert "decode_tok_s<-5% is crossed by m/speed" in done.said
        document = json.loads(done.out)
        (one,) = [change for change in document["changes"] if change["crossed"]]
        assert one["metric"] == "decode_tok_s"
        assert one["change"] == pytest.approx(-0.2)
        assert one["low"] < one["change"] < one["high"]

    def test_without_a_limit_a_change_is_exit_0(self, cli, tmp_path):
        self.folders(tmp_path, 80.0)
        done = cli("report", "old", "new", "--diff")
        assert done.code == 0
        assert "yes, worse" in done.out

    def test_noise_is_exit_0(self, cli, tmp_path):
        self.folders(tmp_path, 90.0, half=20.0)
        assert cli("report", "old", "new", "--diff", "--fail-on", "decode_tok_s<-5%").code == 0

    def test_a_cell_that_no_longer_succeeds_is_exit_1_under_a_limit(self, cli, tmp_path):
        self.folders(tmp_path, 100.0, status="oom")
        done = cli("report", "old", "new", "--diff", "--fail-on", "decode_tok_s<-5%")
        assert done.code == 1
        assert "had succeeded before" in done.said
        assert cli("report", "old", "new", "--diff").code == 0

    def test_of_one_model_its_comparisons_with_another_are_matched(self, cli, tmp_path):
        runs = "demo/ppl-20261123T210622Z-*", "demo-rtn-int4-0ffffe92/*-20261123T*"
        for results in (tmp_path / "old", tmp_path / "new"):
            copy_runs(results, *runs)
            (one,) = results.glob("*/compare-*")
            other = store(results, speed_record("other")) / one.parent.name / "compare-20261101T000000Z-0123"
            other.mkdir()  # against another baseline
            record = json.loads((one / "run.json").read_text())
            record["run_id"] = f"{one.parent.name}/{other.name}"
            record["spec"]["baseline"] = speed_record("other").run_id
            (other / "run.json").write_text(json.dumps(record))
        for folder in sorted((tmp_path / "new").glob("*/ppl-*")):  # both were measured again
            later = folder.with_name(folder.name.replace("ppl-20261123T21", "ppl-20261124T21"))
            folder.rename(later)
            names = f"{folder.parent.name}/{folder.name}", f"{later.parent.name}/{later.name}"
            for record in (tmp_path / "new").glob("*/*/run.json"):
                record.write_text(record.read_text().replace(*names))
        model = "demo-rtn-int4-0ffffe92"
        done = cli("report", "old", "new", "--diff", "--model", model, "--json")
        document = json.loads(done.out)
        assert document["not_compared"] == []
        assert [change["metric"] for change in document["changes"]].count("delta_ln_ppl") == 2
        assert all(run.startswith(model) for change in document["changes"] for run in change["runs"])

    def test_a_run_that_is_missing_is_exit_1_under_a_limit_on_it(self, cli, tmp_path):
        gone = speed_record(size=8)
        store(tmp_path / "old", speed_record(), gone)
        store(tmp_path / "new", speed_record())
        limited = ("report", "old", "new", "--diff", "--fail-on", "decode_tok_s<-5%")
        done = cli(*limited, "--json", "--out", "there")
        assert done.code == 1
        why = f"decode_tok_s<-5% cannot be checked for {gone.run_id}: only in the old folder"
        assert why in " ".join(done.err.split())
        assert json.loads(done.out)["failures"] == [why]
        assert f"{gone.run_id}: only in the old folder" in (tmp_path / "there" / "DIFFERENCE.md").read_text()
        assert cli("report", "old", "new", "--diff").code == 0

    def test_a_new_folder_without_a_run_is_exit_1_under_a_limit(self, cli, tmp_path):
        store(tmp_path / "old", speed_record())
        store(tmp_path / "new", speed_record("other"))
        arguments = ("report", "old", "new", "--diff", "--model", "m")
        assert cli(*arguments).code == 2
        done = cli(*arguments, "--fail-on", "decode_tok_s<-5%")
        assert done.code == 1
        assert "only in the old folder" in done.said

    def test_a_new_record_that_cannot_be_read_is_exit_1_under_a_limit(self, cli, tmp_path):
        self.folders(tmp_path, 100.0)
        damaged = store(tmp_path / "new", speed_record("other")) / speed_record("other").run_id / "run.json"
        damaged.write_text("{")
        done = cli("report", "old", "new", "--diff", "--fail-on", "decode_tok_s<-5%")
        assert done.code == 1
        assert "no limit can be checked for a run that was left out: new/other/speed-" in " ".join(
            done.err.split()
        )
        assert cli("report", "old", "new", "--diff").code == 0

    def test_what_else_is_another_on_the_new_side_is_said_once_everywhere(self, cli, tmp_path):
        store(tmp_path / "old", speed_record(), speed_record(size=8))
        newer = machine(driver="590.2", vllm="0.27.0")
        store(tmp_path / "new", speed_record(machine=newer), speed_record(size=8, machine=newer))
        done = cli("report", "old", "new", "--diff", "--out", "there", "--json")
        assert done.code == 0
        why = "driver 580.1 → 590.2; vllm 0.26.0 → 0.27.0."
        for text in (done.err, (tmp_path / "there" / "DIFFERENCE.md").read_text()):
            assert " ".join(text.split()).count(why) == 1
        assert json.loads(done.out)["surroundings"] == [
            {"name": "driver", "old": "580.1", "new": "590.2", "pairs": 2},
            {"name": "vllm", "old": "0.26.0", "new": "0.27.0", "pairs": 2},
        ]

    def test_it_writes_where_it_is_told(self, cli, tmp_path):
        self.folders(tmp_path, 80.0)
        assert cli("report", "old", "new", "--diff", "--out", "there").code == 0
        text = (tmp_path / "there" / "DIFFERENCE.md").read_text()
        assert text.startswith("# new against old")
        assert "| ttft_ms |" in text, "every metric, also those that the screen leaves out"
        document = json.loads((tmp_path / "there" / "difference.json").read_text())
        assert {"changes", "failures", "not_compared", "surroundings", "tables", "warnings"} == set(document)
