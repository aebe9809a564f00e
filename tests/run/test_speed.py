"""Sweeps by a scripted engine: results, failures, what is kept and what is found again."""

import pandas as pd
import pytest

from evalsuite.core.cache import ALL_RESIDENT
from evalsuite.core.errors import ResumeMismatch
from evalsuite.core.record import Record
from evalsuite.core.spec import SpeedSpec, spec_hash
from evalsuite.run import speed
from evalsuite.store.runs import load_record
from evalsuite.telemetry.gpu import GpuProbe
from evalsuite.telemetry.samples import load_samples


def statuses(found):
    return {f.record.spec["serving"]["moe_expert_cache_size"]: f.record.status for f in found}


def folders(bench):
    return sorted(path.name for path in bench.folder.glob("results/demo/*"))


def test_cached_sizes_share_a_load_and_the_uncached_one_never_held_a_cache(bench):
    chosen = bench.cells()
    found = bench.run(chosen)
    assert statuses(found) == {8: "ok", 16: "ok", None: "ok"}
    assert [f.record.spec_hash for f in found] == [spec_hash(cell) for cell in chosen]
    assert len(bench.opened) == 2
    assert [done for done, _total, _text in bench.watcher.cells] == [1, 2, 3]
    for one in found:
        assert load_record(one.path) == one.record
        result = one.record.results
        assert (result.repeats, result.warmups, result.output_len, result.concurrency) == (2, 1, 4, 1)
        assert result.bound.share > 0
        assert one.record.files == ("tokens.parquet", "telemetry.parquet", "engine.log")
        tokens = pd.read_parquet(one.path / "tokens.parquet")
        assert len(tokens) == 3 * 4
        assert tokens["warmup"].sum() == 4
        assert one.record.telemetry.rss_peak_bytes > 10_000_000
        names = [phase.name for phase in one.record.telemetry.phases]
        assert names[-1] == "prefill" or one.record.expert_cache is None
        assert names.count("decode") == 3
    # the same prompts in every cell: the script's tokens follow from them
    first, *others = (pd.read_parquet(f.path / "tokens.parquet")["token"].tolist() for f in found)
    assert others == [first, first]


def test_counters_cover_the_repeats_alone_and_one_prefill_is_taken_off(bench):
    (eight, *_) = bench.run()
    counters = eight.record.expert_cache
    assert (counters.size, counters.layers[0].steps) == (8, 2 * 4)  # two repeats of four steps
    assert eight.record.engaged["expert_cache_hits"] == 8
    # 100 bytes a step: 800 in all, 100 in each prefill, over 2 · 3 decoding steps
    assert eight.record.results.bound.transfer_bytes_per_token == 100


def test_finished_cells_are_found_again_and_fresh_ones_are_not(bench):
    first = bench.run()
    again = bench.run()
    assert [f.path for f in again] == [f.path for f in first]
    assert bench.opened == []
    anew = bench.run(mode="fresh")
    assert not {f.path for f in anew} & {f.path for f in first}
    assert len(folders(bench)) == 6


def test_another_environment_is_another_measurement(bench, monkeypatch):
    (one,) = bench.run(bench.cells(cache_sizes=(None,)))
    told = one.record.machine.model_copy(update={"environment": {"VLLM_DISABLED_KERNELS": "X"}})
    monkeypatch.setattr(speed, "read_machine", lambda: told)
    (other,) = bench.run(bench.cells(cache_sizes=(None,)))
    assert other.path != one.path
    assert other.record.machine.environment == {"VLLM_DISABLED_KERNELS": "X"}
    (again,) = bench.run(bench.cells(cache_sizes=(None,)))
    assert again.path == other.path


def test_what_is_said_to_several_gpus_makes_no_other_measurement_of_one(bench, monkeypatch):
    (one,) = bench.run(bench.cells(cache_sizes=(None,)))
    told = one.record.machine.model_copy(update={"environment": {"NCCL_NVLS_ENABLE": "0"}})
    monkeypatch.setattr(speed, "read_machine", lambda: told)
    (again,) = bench.run(bench.cells(cache_sizes=(None,)))
    assert again.path == one.path


def test_resuming_what_never_began_is_refused(bench):
    with pytest.raises(ResumeMismatch, match="No cell"):
        bench.run(mode="resume")
    assert bench.opened == []


def test_other_weights_are_another_measurement(bench):
    first = bench.run(bench.cells(cache_sizes=(None,)))
    bench.subject = type(bench.subject)(**vars(bench.subject) | {"fingerprint": "other"})
    second = bench.run(bench.cells(cache_sizes=(None,)))
    assert first[0].path != second[0].path


@pytest.mark.parametrize(
    ("action", "status", "said"),
    [("oom", "oom", "out of memory"), ("fail", "failed", "script fails"), ("crash", "failed", "the script crashes"),
     ("die", "oom", "killed from outside")],
)  # fmt: skip
def test_a_failure_is_a_result_and_the_sweep_goes_on(bench, action, status, said):
    bench.play(on={"generate 2": ["say", "about to fail"], "generate 3": [action]})
    (one,) = bench.run(bench.cells(cache_sizes=(None,)))
    assert one.record.status == status
    assert said in one.record.error
    assert one.record.results is None
    assert len(pd.read_parquet(one.path / "tokens.parquet")) == 2 * 4  # what came before is kept
    assert "about to fail" in (one.path / "engine.log").read_text()
    bench.play()
    (retried,) = bench.run(bench.cells(cache_sizes=(None,)))
    assert retried.record.status == "ok"
    assert retried.path != one.path
    assert load_record(one.path).status == status  # the failure stays on record


def test_a_new_child_takes_over_after_a_failure(bench):
    bench.play(on={"generate 5": ["crash"]})  # the second cell of each child, in its second round
    found = bench.run()
    assert sorted(statuses(found).values()) == ["failed", "failed", "ok"] or len(bench.opened) > 1
    assert len(bench.opened) >= 2
    assert "ok" in statuses(found).values()


def test_a_hang_times_out(bench):
    bench.workload = bench.workload.model_copy(update={"timeout_s": 2.0})
    bench.play(on={"generate": ["hang"]})
    (one,) = bench.run(bench.cells(cache_sizes=(None,)))
    assert one.record.status == "timeout"
    assert len(bench.opened) == 1


def test_an_engine_that_cannot_resize_loads_once_a_size(bench):
    bench.play(on={"resize_expert_cache": ["refuse"]})
    bench.workload = bench.workload.model_copy(update={"repeats": 1, "warmups": 0})
    found = bench.run(bench.cells(concurrencies=(1, 2), cache_sizes=(None,)))
    assert len(bench.opened) == 1
    assert [f.record.status for f in found] == ["ok", "ok"]
    found = bench.run(bench.cells(cache_sizes=(8, 16)))
    assert len(bench.opened) == 2
    assert statuses(found) == {8: "ok", 16: "ok"}
    assert {f.record.engaged["loaded_with_cache_size"] for f in found} == {8, 16}


@pytest.mark.parametrize("ends", ["crash", "die", "hang", "oom"])
def test_an_engine_that_fails_while_it_resizes_is_loaded_anew(bench, ends):
    bench.workload = bench.workload.model_copy(update={"timeout_s": 3.0})
    bench.play(on={"resize_expert_cache": [ends]})
    found = bench.run(bench.cells(cache_sizes=(8, 16)))
    assert statuses(found) == {8: "ok", 16: "ok"}
    assert len(bench.opened) == 2
    (told,) = [f for f in found if any("loaded anew" in warning for warning in f.record.warnings)]
    assert told.record.engaged["loaded_with_cache_size"] in statuses([told])


def test_the_memory_of_a_cell_is_not_that_of_the_engine_before(bench):
    found = bench.run(bench.cells(cache_sizes=(8, None)))
    assert len(bench.opened) == 2
    for one in found:  # watched before there is a process, so that what others use is told apart
        assert load_samples(one.path)["rss_bytes"].isna()[0]


def test_a_cache_that_serves_nothing_is_not_engaged(bench):
    bench.play(idle_cache=True)
    found = bench.run()
    assert statuses(found) == {8: "failed", 16: "failed", None: "ok"}
    (eight, *_) = found
    assert "no expert went through it" in eight.record.error


def test_a_cache_that_holds_every_expert_need_count_nothing(bench):
    facts = {"fingerprint": bench.subject.fingerprint, "engaged": {"experts": ALL_RESIDENT}}
    bench.play(facts=facts)
    found = bench.run(bench.cells(cache_sizes=(128,)))
    assert statuses(found) == {128: "ok"}
    assert found[0].record.expert_cache is None


def test_what_does_not_load_is_not_tried_again_for_the_same_size(bench):
    bench.play(on={"load": ["oom"]})
    found = bench.run(bench.cells(cache_sizes=(8, None), concurrencies=(1, 2)))
    assert [f.record.status for f in found] == ["oom"] * 4
    assert len(bench.opened) == 2


def test_an_engine_without_room_for_its_files_is_one_cell_the_others_go_on(bench):
    bench.play(on={"load": ["full"]})
    found = bench.run(bench.cells(cache_sizes=(8, None)))
    assert [f.record.status for f in found] == ["failed", "failed"]
    assert "no room for its files" in found[0].record.error
    assert len(bench.opened) == 2


def test_a_record_of_a_cell_is_a_record_like_any_other(bench):
    (one,) = bench.run(bench.cells(cache_sizes=(None,)))
    assert Record.model_validate_json((one.path / "run.json").read_text()) == one.record
    assert SpeedSpec.model_validate(one.record.spec).model == "demo"
    assert any("built-in model" in warning for warning in one.record.warnings)
    assert any("scripted engine" in warning for warning in one.record.warnings)


class NoMemory:
    """GPUs that are always idle, but for GPU 1."""

    def __init__(self, gpus):
        self.gpus = set(gpus)

    def wait(self, gpus):
        return ("GPU 1 held 1 GB more",) if 1 in gpus else ()


def test_gpus_are_measured_at_once_and_memory_that_stays_is_noted(bench, monkeypatch):
    monkeypatch.setattr(speed, "IdleMemory", NoMemory)
    bench.play(token_s=0.2)
    found = bench.run(bench.cells(gpus=(0, 1), cache_sizes=(None,)))
    assert [f.record.status for f in found] == ["ok", "ok"]
    assert len(bench.opened) == 2
    first, second = (pd.read_parquet(f.path / "tokens.parquet") for f in found)
    assert first["stamp_s"].min() < second["stamp_s"].max()
    assert second["stamp_s"].min() < first["stamp_s"].max()
    notes = [f.record.warnings for f in found]
    assert ["GPU 1 held 1 GB more" in n for n in notes] == [False, True]
    assert ["GPU 1 was measured at the same time" in n for n in notes] == [True, False]
    assert ["GPU 0 was measured at the same time" in n for n in notes] == [False, True]
    assert [f.record.beside for f in found] == [1, 1]


def test_a_cell_beside_another_process_says_so(bench, monkeypatch):
    guests = property(lambda probe: ("GPU 0: another process used the GPU before the run began",))
    monkeypatch.setattr(GpuProbe, "neighbours", guests)
    (one,) = bench.run(bench.cells(cache_sizes=(None,)))
    assert one.record.telemetry.neighbours == guests.fget(None)
    assert one.record.warnings[-1] == f"{guests.fget(None)[0]}: times and memory are not those of an idle GPU"
