"""Which runs stand beside each other, which stands for several, and what is whose baseline."""

from pathlib import Path
from typing import Any

import pytest

from evalsuite.core.record import CompareResult, Record
from evalsuite.core.telemetry import Telemetry
from evalsuite.report.choose import (
    Lineage,
    compared_runs,
    device_of,
    engine_of,
    environment_of,
    grouped,
    model_of,
    newest,
    perplexity_condition,
    scored_alike,
    speed_condition,
    stand_ins,
)
from evalsuite.report.perplexity_runs import pairings
from evalsuite.store.runs import StoredRun, load_runs
from report.record_files import copy_runs, machine, model, speed_record


def runs(*records):
    return [StoredRun(Path(record.run_id), record) for record in records]


def stand(found):
    return stand_ins(found, newest(found))


def test_of_one_spec_on_one_device_the_newest_stands_for_all():
    old, new = speed_record(stamp="20261101T000000Z"), speed_record(stamp="20261102T000000Z", decode=50)
    other = speed_record(eager=True)
    assert [r.record for r in newest(runs(new, old, other))] == [new, other]


def test_a_run_that_succeeded_stands_before_a_newer_one_that_did_not():
    failed = speed_record(status="oom", stamp="20261102T000000Z")
    done = speed_record()
    assert [r.record.status for r in newest(runs(failed, done))] == ["ok"]
    assert [r.record.status for r in newest(runs(failed))] == ["oom"]


def test_a_run_beside_other_gpus_at_work_stands_behind_one_that_was_alone():
    alone, beside = speed_record(), speed_record(stamp="20261102T000000Z", beside=1)
    assert [r.record for r in newest(runs(beside, alone))] == [alone]
    assert [r.record for r in newest(runs(beside))] == [beside]
    failed = speed_record(status="oom", stamp="20261103T000000Z")
    assert [r.record for r in newest(runs(failed, beside))] == [beside]
    late = speed_record(status="oom", stamp="20261031T000000Z", beside=1)
    assert [r.record for r in newest(runs(alone, late))] == [alone]
    assert speed_condition(alone) != speed_condition(beside)


def test_what_is_said_to_several_gpus_is_no_condition_of_one():
    told = machine().model_copy(update={"environment": {"NCCL_P2P_DISABLE": "1", "VLLM_X": "2"}})
    one = speed_record(machine=told)
    serving = one.spec["serving"] | {"tensor_parallel_size": 2}
    two = one.model_copy(update={"spec": one.spec | {"serving": serving}})
    assert environment_of(one) == "VLLM_X=2"
    assert environment_of(two) == "NCCL_P2P_DISABLE=1 VLLM_X=2"
    assert environment_of(speed_record()) == ""


def test_a_failed_run_is_on_the_device_that_it_was_to_run_on():
    assert device_of(speed_record(status="oom")) == "H100"
    assert model_of(speed_record("some-model", status="oom")) == "some-model"


def test_speeds_are_comparable_whatever_the_model_and_the_index_of_the_gpu():
    one, two = speed_record("a"), speed_record("b")
    moved = {**two.spec, "serving": {**two.spec["serving"], "gpus": [1]}}
    assert speed_condition(one) == speed_condition(two.model_copy(update={"spec": moved}))


def test_speeds_are_not_comparable_when_driver_libraries_or_serving_differ():
    one = speed_record()
    for other in (
        speed_record(machine=machine(driver="570.0")),
        speed_record(machine=machine(vllm="0.27.0")),
        speed_record(eager=True),
        speed_record(size=8),
    ):
        assert speed_condition(one) != speed_condition(other)


def test_perplexities_of_another_protocol_or_number_of_windows_are_apart(tmp_path: Path):
    copy_runs(tmp_path, "smollm2/ppl-*")
    records = [run.record for run in load_runs(tmp_path)[0]]
    assert len({perplexity_condition(record) for record in records}) == 2
    assert [len(group) for group in grouped(records, perplexity_condition)] == [1, 1]


def test_a_run_that_had_its_gpu_to_itself_stands_before_a_newer_one_that_had_not():
    beside = Telemetry(rss_peak_bytes=None, neighbours=("GPU 0: another process used it",))
    shared = speed_record(stamp="20261102T000000Z").model_copy(update={"telemetry": beside})
    alone, failed = speed_record(), speed_record(status="oom", stamp="20261103T000000Z")
    assert [r.record for r in newest(runs(failed, shared, alone))] == [alone]
    assert [r.record for r in newest(runs(failed, shared))] == [shared]


class TestScoredAlike:
    """Runs made of one record."""

    @pytest.fixture
    def of(self, tmp_path: Path):
        copy_runs(tmp_path, "demo/ppl-20261123T210622Z-*")
        (run,) = load_runs(tmp_path)[0]
        assert run.record.model is not None

        def made(name: str, *, weights: str = "w", **changes: Any) -> Record:
            facts = run.record.model.model_copy(update={"fingerprint": weights})
            return run.record.model_copy(update={"run_id": name, "model": facts} | changes)

        return made

    def test_one_spec_of_two_checkpoints_stays_apart(self, of):
        new, old = of("new"), of("old", weights="before")
        assert stand(runs(new, old)) == {"new": "new", "old": "old"}

    def test_the_newest_stands_though_a_failure_of_its_spec_is_newer_still(self, of):
        failed = of("t3", status="failed", results=None, spec_hash="a")
        between, old = of("t2", spec_hash="b"), of("t1", spec_hash="a")
        assert [run.record.run_id for run in newest(runs(failed, between, old))] == ["t2"]
        assert stand(runs(failed, between, old)) == {"t2": "t2", "t1": "t2"}

    @pytest.mark.parametrize(
        "change", [{"tensor_parallel_size": 2}, {"additional_config": {"a": 1}}, {"moe_expert_cache_size": 8}]
    )
    def test_what_vllm_was_told_tells_apart(self, of, change):
        spec = of("x").spec
        assert scored_alike(of("x")) != scored_alike(of("y", spec=spec | change))

    def test_a_comparison_of_two_that_count_once_keeps_its_runs(self):
        result = CompareResult.model_construct(candidate_run="a", baseline_run="b")
        assert compared_runs(result, {"a": "b"}) == ("a", "b")
        assert compared_runs(result, {"a": "c"}) == ("c", "b")


class TestOneModelThroughTwoEngines:
    @pytest.fixture
    def runs(self, tmp_path: Path):
        copy_runs(tmp_path, "smollm2-bf16-83d13ebf/*", "smollm2-rtn-int4-4b375fcb/*")
        return load_runs(tmp_path)[0]

    def test_of_runs_that_scored_alike_the_newest_stands(self, runs):
        def scored(found):
            return [run.record for run in found if run.record.kind == "ppl"]

        kept = scored(newest(runs))
        assert len({scored_alike(record) for record in scored(runs)}) == len(kept) == 8
        assert len(scored(runs)) == 10, "one more of each, from another folder"
        stood = stand(runs)
        assert set(stood.values()) == {record.run_id for record in kept}
        assert all(stood[record.run_id] == record.run_id for record in kept)

    def test_each_engine_has_its_own_baseline(self, runs):
        records = [run.record for run in newest(runs)]
        scored = [record for record in records if record.kind == "ppl"]
        lineage = Lineage(records, stand(runs))
        for group in grouped(scored, perplexity_condition):
            for record in group:
                base = lineage.baseline(record, group)
                if "bf16" in record.run_id:
                    assert base is None, "the other engine's run is of the same weights"
                else:
                    assert base is not None
                    assert (engine_of(base), "bf16" in base.run_id) == (engine_of(record), True)

    def test_pairs_of_one_checkpoint_are_apart(self, runs):
        found = pairings([run.record for run in newest(runs)], stand(runs))
        engines = [pair for pair in found if pair.engines]
        assert len(engines) == len(found) - len(engines) == 4, "two models or two engines, two protocols each"
        assert all("(vllm)" in pair.names[0] and "(torch)" in pair.names[1] for pair in engines)


class TestLineage:
    def test_a_recorded_comparison_names_the_baseline(self, tmp_path: Path):
        copy_runs(
            tmp_path,
            "demo/ppl-20261123T210622Z-*",
            "demo-rtn-int4-0ffffe92/*-20261123T*",
            "demo-absmax*/ppl-*",
        )
        records = [run.record for run in load_runs(tmp_path)[0]]
        scored = [record for record in records if record.kind == "ppl"]
        lineage = Lineage(records)
        found = {r.run_id.partition("/")[0]: lineage.baseline(r, scored) for r in scored}
        base = next(record for record in scored if record.run_id.startswith("demo/"))
        assert found["demo-rtn-int4-0ffffe92"] is base
        assert found["demo"] is None
        assert found["demo-absmax-q5-11c1422a"] is None, "stored as BF16, and nothing says whose it is"

    def test_a_recorded_quantization_names_its_source(self, tmp_path: Path):
        copy_runs(tmp_path, "demo/*-20261123T2106*", "demo-absmax*/ppl-*")
        records = [run.record for run in load_runs(tmp_path)[0]]
        scored = [record for record in records if record.kind == "ppl"]
        absmax = next(record for record in scored if "absmax" in record.run_id)
        base = Lineage(records).baseline(absmax, scored)
        assert base is not None
        assert base.run_id.startswith("demo/")

    def test_else_the_one_plain_model_of_the_same_shape(self):
        int4 = speed_record("int4", stored="dummy weights (INT4 geometry)")
        bf16 = speed_record("bf16", stored="dummy weights (BF16 geometry)")
        assert Lineage([]).baseline(int4, [int4, bf16]) is bf16
        assert Lineage([]).baseline(bf16, [int4, bf16]) is None

    def test_of_two_plain_models_neither_is_guessed(self):
        int4 = speed_record("int4", stored="INT4 safetensors")
        assert Lineage([]).baseline(int4, [int4, speed_record("a"), speed_record("b")]) is None

    def test_a_model_of_another_size_is_no_baseline(self):
        int4 = speed_record("int4", stored="INT4 safetensors")
        other = speed_record("other", model=model("other", parameters=7))
        assert Lineage([]).baseline(int4, [int4, other]) is None
