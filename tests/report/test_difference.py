"""Two folders: what is matched, how much it changed with which certainty, and what is not compared."""

import math
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from evalsuite.core.record import Record
from evalsuite.report.changes import Number, absolute, relative
from evalsuite.report.difference import Change, changes_tables, difference, telling, unmatched_table
from evalsuite.report.limits import parse_limit
from evalsuite.store.runs import StoredRun, load_runs
from report.record_files import copy_runs, edit, machine, model, speed_record, store

DEMO = "demo/ppl-20261123T210622Z-*"
LATER = "20261102T000000Z"


def compared(old: Path, new: Path):
    return difference(load_runs(old)[0], load_runs(new)[0])


def on_gpu(index: int, record: Record) -> Record:
    serving = {**record.spec["serving"], "gpus": [index]}
    changed = {"spec": {**record.spec, "serving": serving}, "spec_hash": f"{index:012}"}
    return record.model_copy(update=changed)


def change(found, metric: str) -> Change:
    (one,) = [c for c in found.changes if c.metric.name == metric]
    return one


class TestChanges:
    def test_relative_with_half_widths_in_squares(self):
        shift = relative(Number(100, 97, 103), Number(50, 48, 52))
        assert shift is not None
        half = 0.5 * math.hypot(0.03, 0.04)
        assert (shift.value, shift.low, shift.high) == pytest.approx((-0.5, -0.5 - half, -0.5 + half))
        assert shift.certain is True

    def test_absolute_with_half_widths_in_squares(self):
        shift = absolute(Number(10, 7, 13), Number(11, 7, 15))
        assert (shift.value, shift.low, shift.high) == pytest.approx((1, -4, 6))
        assert shift.certain is False

    def test_without_an_interval_on_either_side_there_is_none(self):
        for old, new in ((Number(10), Number(11, 10, 12)), (Number(10, 9, 11), Number(11))):
            assert absolute(old, new).certain is None
            found = relative(old, new)
            assert found is not None
            assert found.low is None

    @pytest.mark.parametrize("old", [0, -0.5])
    def test_of_what_is_not_positive_there_is_no_share(self, old: float):
        assert relative(Number(old), Number(1)) is None


class TestPerplexity:
    def scaled(self, tmp_path: Path, factor: float) -> Path:
        """The same run with every window's nats times `factor`, and its perplexity accordingly."""
        folder = next(copy_runs(tmp_path, DEMO).glob(DEMO))
        windows = pd.read_parquet(folder / "windows.parquet")
        windows["nats"] *= factor
        windows.to_parquet(folder / "windows.parquet")
        nats = windows["nats"].sum() / windows["scored"].sum()
        edit(folder, lambda data: data["results"].update(perplexity=math.exp(nats)))
        return tmp_path

    def test_a_rise_far_below_the_texts_own_variation_is_certain(self, tmp_path: Path):
        old, new = copy_runs(tmp_path / "old", DEMO), self.scaled(tmp_path / "new", 1.005)
        one = change(compared(old, new), "ppl")
        assert one.relative is not None
        assert one.relative.value == pytest.approx(one.before.value**0.005 - 1)
        assert one.relative.low is not None
        assert one.relative.high is not None
        assert 0 < one.relative.low < one.relative.value < one.relative.high < 0.01
        assert one.before.high is not None
        assert one.after.value < one.before.high, "unpaired, the intervals overlap"
        assert one.absolute.value == pytest.approx(one.after.value - one.before.value)

    def test_the_same_run_twice_is_equal(self, tmp_path: Path):
        old, new = copy_runs(tmp_path / "old", DEMO), copy_runs(tmp_path / "new", DEMO)
        one = change(compared(old, new), "ppl")
        assert (one.shift.value, one.shift.low, one.shift.high) == (0, 0, 0)
        assert not one.crossed([parse_limit("ppl>+0%"), parse_limit("ppl>+0.1")])

    def test_without_samples_the_intervals_are_combined(self, tmp_path: Path):
        old, new = copy_runs(tmp_path / "old", DEMO), self.scaled(tmp_path / "new", 1.005)
        next(new.glob(f"{DEMO}/windows.parquet")).unlink()
        one = change(compared(old, new), "ppl")
        assert one.shift.certain is False

    def test_another_text_is_not_compared(self, tmp_path: Path):
        old, new = copy_runs(tmp_path / "old", DEMO), copy_runs(tmp_path / "new", DEMO)
        edit(next(new.glob(DEMO)), lambda data: data["text"].update(sha256="0" * 64))
        found = compared(old, new)
        assert found.changes == ()
        assert [one.why for one in found.unmatched] == [
            "another text, tokenizer or number of windows than before"
        ]

    def test_a_comparison_is_matched_by_what_it_compares(self, tmp_path: Path):
        runs = DEMO, "demo-rtn-int4-0ffffe92/*-20261123T*"
        old, new = copy_runs(tmp_path / "old", *runs), copy_runs(tmp_path / "new", *runs)
        found = compared(old, new)
        assert {c.metric.name for c in found.changes} == {"ppl", "delta_ln_ppl", "kl_nats", "top1_percent"}
        assert found.unmatched == ()


class TestWhichRunCounts:
    def test_of_a_comparison_that_was_scored_again_the_newest(self, tmp_path: Path):
        runs = DEMO, "demo-rtn-int4-0ffffe92/*-20261123T*"
        old, new = copy_runs(tmp_path / "old", *runs), copy_runs(tmp_path / "new", *runs)
        (first,) = new.glob("demo-rtn*/compare-*")
        kind, _, digest = first.name.split("-")
        again = first.with_name(f"{kind}-20270101T000000Z-0{digest[1:]}")
        shutil.copytree(first, again)
        # it names a perplexity that was measured again, of the same spec
        (scored,) = new.glob("demo-rtn*/ppl-*")
        repeat = scored.with_name(f"ppl-20261231T000000Z-{scored.name.split('-')[2]}")
        shutil.copytree(scored, repeat)
        name = f"{repeat.parent.name}/{repeat.name}"
        edit(repeat, lambda data: data.update(run_id=name))

        def rescored(data: dict[str, Any]) -> None:
            data.update(run_id=f"{again.parent.name}/{again.name}", spec_hash=f"0{digest[1:]}")
            data["spec"]["candidate"] = data["results"]["candidate_run"] = name
            data["results"].update(delta_ln_ppl=0.75)

        edit(again, rescored)
        found = compared(old, new)
        assert change(found, "delta_ln_ppl").after.value == 0.75
        assert found.unmatched == ()

    def test_of_runs_on_another_index_of_gpu_the_newest(self, tmp_path: Path):
        old = store(tmp_path / "old", speed_record())
        new = store(
            tmp_path / "new", speed_record(decode=90.0), on_gpu(1, speed_record(decode=80.0, stamp=LATER))
        )
        assert change(compared(old, new), "decode_tok_s").after.value == 80

    def test_a_newer_failure_in_the_new_folder_is_broken(self, tmp_path: Path):
        old = store(tmp_path / "old", speed_record())
        new = store(tmp_path / "new", speed_record(), speed_record(status="oom", stamp=LATER))
        found = compared(old, new)
        assert [one.run.record.status for one in found.broken] == ["oom"]
        assert found.changes == ()

    def test_a_newer_failure_in_the_old_folder_does_not_hide_what_succeeded(self, tmp_path: Path):
        old = store(tmp_path / "old", speed_record(), on_gpu(1, speed_record(status="oom", stamp=LATER)))
        new = store(tmp_path / "new", speed_record(decode=80.0))
        assert change(compared(old, new), "decode_tok_s").shift.value == pytest.approx(-0.2)

    def test_comparisons_with_other_baselines_are_apart_whatever_runs_are_chosen(self, tmp_path: Path):
        runs = DEMO, "demo-rtn-int4-0ffffe92/*-20261123T*"
        folder = copy_runs(tmp_path, *runs)
        every = load_runs(folder)[0]
        chosen = [run for run in every if run.record.run_id.startswith("demo-rtn")]
        (one,) = [run for run in chosen if run.record.kind == "compare"]
        spec = {**one.record.spec, "baseline": "demo/ppl-20270101T000000Z-000000000000"}
        other = StoredRun(one.path, one.record.model_copy(update={"spec": spec, "run_id": "demo-rtn/other"}))
        found = difference([*chosen, other], chosen, sides=every)
        assert {c.old.record.run_id for c in found.changes if c.metric.name == "delta_ln_ppl"} == {
            one.record.run_id
        }
        assert [row.run.record.run_id for row in found.unmatched] == ["demo-rtn/other"]


class TestUnchecked:
    """A limit on what is no longer measured is not held."""

    LIMITS = (parse_limit("decode_tok_s<-5%"),)

    def test_a_run_that_is_missing(self, tmp_path: Path):
        gone = speed_record(size=8, stamp=LATER)
        old = store(tmp_path / "old", speed_record(), gone)
        new = store(tmp_path / "new", speed_record(), speed_record(size=16))
        found = compared(old, new)
        assert found.failures(self.LIMITS) == [
            f"decode_tok_s<-5% cannot be checked for {gone.run_id}: only in the old folder"
        ]
        assert found.failures([parse_limit("ppl>+1%")]) == [], "no old run has it"
        assert found.failures([]) == []

    def test_a_missing_run_that_had_failed_before_is_no_loss(self, tmp_path: Path):
        old = store(tmp_path / "old", speed_record(), speed_record(size=8, status="oom"))
        new = store(tmp_path / "new", speed_record())
        assert compared(old, new).failures(self.LIMITS) == []

    def test_another_text(self, tmp_path: Path):
        old, new = copy_runs(tmp_path / "old", DEMO), copy_runs(tmp_path / "new", DEMO)
        edit(next(new.glob(DEMO)), lambda data: data["text"].update(tokenizer_sha256="0" * 64))
        (failure,) = compared(old, new).failures([parse_limit("ppl>+1%")])
        assert failure.startswith("ppl>+1% cannot be checked for demo/ppl-")
        assert failure.endswith("another text, tokenizer or number of windows than before")

    def test_a_metric_that_the_new_run_lost(self, tmp_path: Path):
        old = store(tmp_path / "old", speed_record())
        new = store(tmp_path / "new", speed_record(telemetry=None))
        found = compared(old, new)
        (failure,) = found.failures([parse_limit("rss_gb>+10%")])
        assert failure.endswith("has no rss_gb, and had it before")
        assert found.failures(self.LIMITS) == []

    def test_a_share_of_zero(self, tmp_path: Path):
        old, new = (store(tmp_path / name, speed_record(size=8)) for name in ("old", "new"))
        edit(
            next(old.glob("m/*")),
            lambda data: data["expert_cache"]["layers"][0].update(hits=0, misses=128),
        )
        limits = [parse_limit("hits_percent<-5%")]
        assert compared(old, old).failures(limits) == []
        found = compared(old, new)
        (failure,) = found.failures(limits)
        assert failure.endswith("was 0 before, of which there is no share")
        (table,) = changes_tables(telling(found.changes, limits), limits, found.names)
        assert {row[0]: row[-1] for row in table.cells()}["hits_percent"] == "unchecked"


class TestSigned:
    """Δ ln PPL, which is negative where the candidate is better and next to 0 where it is as good."""

    @pytest.mark.parametrize(
        ("old", "new", "changed", "shown"),
        [
            ((-0.02, -0.021, -0.019), (0.01, 0.009, 0.011), "+0.0300 ± 0.0014", "yes, worse"),
            ((-0.02, -0.021, -0.019), (-0.04, -0.041, -0.039), "-0.0200 ± 0.0014", "yes, better"),
            ((0.02, 0.019, 0.021), (0.04, 0.039, 0.041), "+0.0200 ± 0.0014", "yes, worse"),
            ((0.0001, -0.0005, 0.0007), (0.0001, -0.0005, 0.0007), "+0.00000 ± 0.00085", "equal"),
        ],
    )
    def test_it_changes_by_itself_and_not_by_a_share(self, tmp_path: Path, old, new, changed, shown):
        runs = DEMO, "demo-rtn-int4-0ffffe92/*-20261123T*"
        for name, ends in (("old", old), ("new", new)):
            copy_runs(tmp_path / name, *runs)
            (folder,) = (tmp_path / name).glob("demo-rtn*/compare-*")
            values = dict(zip(("delta_ln_ppl", "low", "high"), ends, strict=True))
            edit(folder, lambda data, values=values: data["results"].update(values))
        found = compared(tmp_path / "old", tmp_path / "new")
        one = change(found, "delta_ln_ppl")
        assert one.relative is None
        (table,) = changes_tables([one], (), found.names)
        assert table.cells()[0][3:] == [changed, shown]


class TestSpeed:
    def test_a_fall_beyond_its_interval(self, tmp_path: Path):
        old = store(tmp_path / "old", speed_record(decode=100.0))
        new = store(tmp_path / "new", speed_record(decode=80.0))
        found = compared(old, new)
        one = change(found, "decode_tok_s")
        assert one.shift.value == pytest.approx(-0.2)
        limits = [parse_limit("decode_tok_s<-5%"), parse_limit("decode_tok_s<-25%"), parse_limit("ppl>+1%")]
        assert [limit.text for _, limit in found.crossed(limits)] == ["decode_tok_s<-5%"]
        (table,) = changes_tables(telling(found.changes, limits), limits, found.names)
        rows = {row[0]: row[1:] for row in table.cells()}
        assert rows["decode_tok_s"] == ["100.0 ± 1.0", "80.0 ± 1.0", "-20.0 ± 1.3 %", "yes, worse", "crossed"]
        assert rows["weights_gb"][-2:] == ["equal", "—"]

    def test_a_fall_within_its_interval_crosses_nothing(self, tmp_path: Path):
        old = store(tmp_path / "old", speed_record(decode=100.0, half=20))
        new = store(tmp_path / "new", speed_record(decode=80.0, half=20))
        found = compared(old, new)
        assert change(found, "decode_tok_s").shift.certain is False
        assert found.crossed([parse_limit("decode_tok_s<-5%")]) == []
        (table,) = changes_tables(found.changes, (), found.names)
        assert {row[0]: row[4] for row in table.cells()}["decode_tok_s"] == "no"

    def test_another_index_of_gpu_matches_and_another_device_does_not(self, tmp_path: Path):
        old = store(tmp_path / "old", speed_record())
        new = store(tmp_path / "new", on_gpu(1, speed_record()))
        assert change(compared(old, new), "decode_tok_s").shift.value == 0
        other = model().model_copy(update={"device_name": "H200"})
        apart = store(tmp_path / "apart", speed_record(model=other))
        found = compared(old, apart)
        assert found.changes == ()
        assert sorted(one.why for one in found.unmatched) == [
            "only in the new folder",
            "only in the old folder",
        ]

    def test_another_driver_is_what_a_regression_check_is_for(self, tmp_path: Path):
        old = store(tmp_path / "old", speed_record())
        new = store(tmp_path / "new", speed_record(decode=90.0, machine=machine(driver="570.0")))
        assert change(compared(old, new), "decode_tok_s").shift.value == pytest.approx(-0.1)

    def test_a_cell_that_no_longer_succeeds_is_broken(self, tmp_path: Path):
        old = store(tmp_path / "old", speed_record(), speed_record(size=8, status="oom"))
        new = store(tmp_path / "new", speed_record(status="oom"), speed_record(size=8, status="oom"))
        found = compared(old, new)
        assert [one.why for one in found.broken] == ["out of memory, and had succeeded before"]
        whys = {row[2] for row in unmatched_table(found.unmatched, found.names).cells()}
        assert whys == {"out of memory, and had succeeded before", "out of memory, as before"}


class TestNames:
    """Checkpoints of one name, which lie in different places."""

    def of(self, place: str, stamp: str = "20261101T000000Z", **changes: Any) -> Record:
        """A cell of the checkpoint ``demo-int4`` there."""
        record = speed_record("demo-int4", stamp=stamp)
        return record.model_copy(update={"spec": {**record.spec, "model": f"{place}/demo-int4"}} | changes)

    def test_two_pairs_of_one_name_have_two_titles(self, tmp_path: Path):
        runs = self.of("./a"), self.of("./b", LATER), speed_record("other")
        old, new = (store(tmp_path / side, *runs) for side in ("old", "new"))
        found = compared(old, new)
        titles = [table.title for table in changes_tables(found.changes, (), found.names)]
        assert sorted(title.partition(":")[0] for title in titles) == [
            "demo-int4 (./a/demo-int4)", "demo-int4 (./b/demo-int4)", "other"
        ]  # fmt: skip

    def test_a_name_alone_is_enough_where_different_things_were_measured(self, tmp_path: Path):
        runs = self.of("./a"), speed_record("demo-int4", size=8)
        old, new = (store(tmp_path / side, *runs) for side in ("old", "new"))
        assert set(compared(old, new).names.values()) == {"demo-int4"}

    def test_runs_without_a_partner_are_told_apart(self, tmp_path: Path):
        old, new = store(tmp_path / "old", self.of("./a")), store(tmp_path / "new", self.of("./b", LATER))
        found = compared(old, new)
        rows = {row[0]: row[2] for row in unmatched_table(found.unmatched, found.names).cells()}
        assert rows == {
            "demo-int4 (./a/demo-int4)": "only in the old folder",
            "demo-int4 (./b/demo-int4)": "only in the new folder",
        }

    def test_other_weights_under_the_same_name_are_said(self, tmp_path: Path):
        again = model("demo-int4").model_copy(update={"fingerprint": "0123456789abcdef"})
        old = store(tmp_path / "old", self.of("."))
        new = store(tmp_path / "new", self.of(".", LATER, model=again))
        (one,) = compared(old, new).surroundings
        assert (one.name, one.new) == ("weights of demo-int4", "0123456789ab")
