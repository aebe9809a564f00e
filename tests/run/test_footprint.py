"""Footprints of a scripted engine in a real process, and of ones that die."""

import os

import pytest

from evalsuite.core.cache import ALL_RESIDENT
from evalsuite.core.errors import EngineDied, NotEngaged, OutOfMemory, UsageError
from evalsuite.core.spec import FootprintSpec, Serving
from evalsuite.run.footprint import run_footprint
from evalsuite.store.runs import RunStore, load_record
from evalsuite.telemetry.phases import by_phase
from evalsuite.telemetry.samples import load_samples


def watch(bench, **serving):
    spec = FootprintSpec(
        model="demo",
        serving=Serving(**serving),
        workload=bench.workload.model_copy(update={"repeats": 1, "warmups": 0}),
        idle_s=0.3,
    )
    heard = []
    found = run_footprint(spec, bench.subject, RunStore(bench.folder / "results"), heard.append, bench.open)
    assert all(engine._members() == [] for engine in bench.opened)
    return found, heard


def test_four_phases_and_everything_beside_the_record(bench):
    bench.play(load_s=0.4, first_token_s=0.1, token_s=0.06)
    found, heard = watch(bench)
    assert heard == ["load", "idle", "prefill", "decode"]
    record = load_record(found.path)
    assert (record, record.status, found.error) == (found.record, "ok", None)
    assert [phase.name for phase in record.telemetry.phases] == heard
    load, idle, prefill, decode = record.telemetry.phases
    assert load.stop_s - load.start_s >= 0.4
    assert idle.stop_s - idle.start_s == pytest.approx(0.3, abs=0.2)
    assert prefill.stop_s - prefill.start_s >= 0.1
    assert decode.stop_s - decode.start_s >= 0.15
    assert record.files == ("telemetry.parquet", "engine.log")
    assert all((found.path / name).is_file() for name in record.files)
    weights = bench.subject.checkpoint.weight_files()
    assert record.results.checkpoint_bytes == sum(path.stat().st_size for path in weights)
    assert record.results.disk_bytes["checkpoint"] > 0
    assert record.results.disk_absent["expert_files"]
    assert record.telemetry.engine.absent["weights_bytes"]
    for phase in by_phase(load_samples(found.path), record.telemetry.phases):
        assert phase.rss_peak_bytes > 1e6


def test_how_cold_the_load_was(bench):
    path = bench.subject.checkpoint.weight_files()[0]
    path.read_bytes()
    share = watch(bench)[0].record.results.load.resident_share
    assert share is None or share > 0.5


@pytest.mark.parametrize(
    ("script", "status", "error", "phases"),
    [
        ({"load": ["oom"]}, "oom", OutOfMemory, ["load"]),
        ({"load": ["die"]}, "oom", OutOfMemory, ["load"]),
        ({"generate": ["crash"]}, "failed", EngineDied, ["load", "idle", "prefill"]),
    ],
)
def test_an_engine_that_fails_is_a_result(bench, script, status, error, phases):
    bench.play(on=script, load_s=0.1)
    found, _ = watch(bench)
    assert isinstance(found.error, error)
    record = load_record(found.path)
    assert (record.status, record.results) == (status, None)
    assert record.error == str(found.error)
    assert ".partial" not in record.error
    assert [phase.name for phase in record.telemetry.phases] == phases
    assert record.telemetry.rss_peak_bytes > 1e6
    assert len(load_samples(found.path))


def test_an_expert_cache_that_nothing_went_through(bench):
    bench.play(idle_cache=True)
    found, _ = watch(bench, moe_expert_cache_size=8)
    assert isinstance(found.error, NotEngaged)
    assert found.record.status == "failed"


def test_an_expert_cache_that_holds_every_expert(bench):
    facts = {"fingerprint": bench.subject.fingerprint, "engaged": {"experts": ALL_RESIDENT}}
    bench.play(facts=facts)
    found, _ = watch(bench, moe_expert_cache_size=128)
    assert found.error is None
    assert found.record.status == "ok"


def test_the_expert_file_that_the_engine_has_open_is_followed(bench, monkeypatch):
    cache = bench.folder / "experts"
    cache.mkdir()
    (cache / "ours.experts").write_bytes(os.urandom(50_000))
    (cache / "another.experts").write_bytes(os.urandom(70_000))
    monkeypatch.setenv("HLWQ_EVAL_CACHE", str(cache))
    bench.play(load_s=0.2, open=str(cache / "ours.experts"))
    found, _ = watch(bench, moe_expert_cache_size=8, moe_expert_store="disk")
    series = {series.name: series for series in found.record.telemetry.series}
    assert 50_000 <= series["disk_expert_files_bytes"].last < 70_000
    assert series["page_cache_expert_files_bytes"].last == 50_000
    assert 50_000 <= found.record.results.disk_bytes["expert_files"] < 70_000


def test_dummy_weights_have_no_checkpoint(bench):
    found, _ = watch(bench, load_format="dummy")
    result = found.record.results
    assert result.checkpoint_bytes == 0
    assert "checkpoint" not in result.disk_bytes
    assert "no file" in result.disk_absent["checkpoint"]
    assert result.load.resident_share is None


def test_a_server_that_runs_already_cannot_be_watched(bench):
    with pytest.raises(UsageError, match="cannot be watched"):
        watch(bench, server_url="http://127.0.0.1:9")
    assert not bench.opened
    assert not (bench.folder / "results").exists()


def test_an_interruption_leaves_no_process_and_says_so(bench, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("evalsuite.run.footprint.live", interrupt)
    with pytest.raises(KeyboardInterrupt):
        watch(bench)
    assert all(engine._members() == [] for engine in bench.opened)
    (left,) = (bench.folder / "results").glob("demo/*.partial")
    assert '"status": "interrupted"' in (left / "run.json").read_text()
