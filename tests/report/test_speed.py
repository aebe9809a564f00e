"""Tables and pictures of a sweep, from records made by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from evalsuite.core.cache import CacheCounters, LayerCounters
from evalsuite.core.forecast import Forecast
from evalsuite.core.record import Machine, ModelFacts, Record
from evalsuite.core.spec import Serving, SpeedSpec, Workload, spec_hash
from evalsuite.core.speed import Bound, Estimate, LoadTimes, SpeedResult
from evalsuite.measure.speed import estimate
from evalsuite.report.forecast import forecast_table
from evalsuite.report.speed import (
    device_table,
    failure_table,
    graph_ratios,
    latency_table,
    load_table,
    speed_table,
)
from evalsuite.report.speed_cell import Row, mode_pairs, speed_order
from evalsuite.report.speed_plots import cache_curves, mode_bars

MACHINE = Machine(platform="x", cpu="c", cpu_cores=1, ram_bytes=1, python="3.11", packages={})
FACTS = ModelFacts(
    name="m", architecture="a", parameters=1, vocabulary=9, max_context=None, fingerprint="f", stored="s",
    stored_bytes=1, computed="c", dtype="bfloat16", device="cuda:0", device_name="H100",
)  # fmt: skip


def one(value):
    return Estimate(mean=value, std=None, low=None, high=None, n=1)


def row(
    speed=100.0, *, eager=True, size=None, device="H100", model="m", load="auto", concurrency=1, **changes
):
    spec = SpeedSpec(
        model=model,
        serving=Serving(enforce_eager=eager, moe_expert_cache_size=size, load_format=load),
        workload=Workload(corpus="builtin", concurrency=concurrency, repeats=3),
    )
    bound = Bound(
        bytes_per_token=10, transfer_bytes_per_token=0, bandwidth_bytes_per_s=1e4,
        transfer_bandwidth_bytes_per_s=None, tokens_per_s=1234.0, share=speed / 1234,
    )  # fmt: skip
    decode = estimate(np.array([speed - 1, speed, speed + 1]))
    result = SpeedResult(
        input_len=512, output_len=128, concurrency=concurrency, repeats=3, warmups=1, ttft_s=one(0.0123),
        tpot_s=one(1 / speed), itl_p50_s=0.01, itl_p90_s=0.02, itl_p99_s=1.5, decode_tokens_per_s=decode,
        output_tokens_per_s=one(80.0), prefill_tokens_per_s=one(9000.0),
        load=LoadTimes(total_s=12.0, resident_share=0.99), bound=bound,
    )  # fmt: skip
    counters = None
    if size is not None:
        layer = LayerCounters(layer=0, steps=10, hits=30, misses=10, overflow_steps=0, bytes_moved=1)
        counters = CacheCounters(
            size=size, experts=128, policy="lru", store="pinned", expert_bytes=1, layers=(layer,)
        )
    record = Record(
        run_id=f"m/{spec_hash(spec)}-{device}", kind="speed", status="ok", started="t", finished="t",
        spec=spec.model_dump(mode="json"), spec_hash=spec_hash(spec), machine=MACHINE,
        model=FACTS.model_copy(update={"name": model, "device_name": device}), results=result,
        expert_cache=counters, engaged={"engine": "vllm"},
    )  # fmt: skip
    return Row(record, **{"verdict": "memory 60 %"} | changes)


def column(table, title):
    (place,) = (i for i, c in enumerate(table.columns) if c.title == title)
    return [cells[place] for cells in table.cells()]


def test_settings_that_do_not_vary_are_in_the_caption():
    table = speed_table([row(), row(size=8)])
    titles = [c.title for c in table.columns]
    assert titles[0] == "cache"
    assert "mode" not in titles
    assert column(table, "cache") == ["all", "8"]
    for said in (
        "m, eager, policy lru, store pinned, on H100, concurrency 1",
        "512 prompt tokens",
        "128 output tokens",
        "3 repeats",
    ):
        assert said in table.caption


def under(one, machine=MACHINE, **changes):
    return replace(one, record=one.record.model_copy(update={"machine": machine, **changes}))


def test_what_some_cells_ran_under_is_said_of_these_alone():
    told = MACHINE.model_copy(update={"environment": {"VLLM_X": "2"}})
    table = speed_table([row(), under(row(size=8), told)])
    assert column(table, "environment") == ["none", "E1"]
    assert "with VLLM" not in table.caption
    assert "; E1: VLLM_X=2." in table.caption
    assert "with VLLM_X=2" in speed_table([under(row(), told)]).caption
    assert "with" not in speed_table([row()]).caption


def test_gpus_beside_are_said_of_the_cells_that_had_them():
    alone, beside = row(100.0), under(row(90.0), beside=1)
    assert column(speed_table([alone, beside]), "GPUs beside") == ["none", "1"]
    assert column(speed_table([alone, under(row(size=8), beside=1)]), "GPUs beside") == ["none", "1"]
    assert "other GPUs measured at the same time: 1" in speed_table([beside]).caption
    assert "same time" not in speed_table([alone]).caption


def test_eager_and_graphs_are_paired_with_as_much_beside_them_where_there_is_such_a_pair():
    eager = row(10.0), under(row(9.0), beside=1)
    graphs = row(200.0, eager=False), under(row(100.0, eager=False), beside=1)
    assert mode_pairs([*eager, *graphs]) == [(eager[0], graphs[0]), (eager[1], graphs[1])]
    assert mode_pairs([eager[0], graphs[1]]) == [(eager[0], graphs[1])]


def test_across_gpus_a_number_is_of_the_quiet_cell():
    cells = [row(100.0), under(row(150.0, device="H200"), beside=1), row(225.0, device="H200")]
    table = device_table(cells)
    assert column(table, "H200")[0].startswith("225")
    assert [c.title for c in table.columns] == ["model", "H100", "H200"]


def test_numbers_are_rounded_by_their_uncertainty_and_carry_units():
    table = speed_table([row(100.0)])
    # s = 1, n = 3: half = 4.303 / √3 = 2.48
    assert column(table, "decode") == ["100.0 ± 2.5"]
    assert [c.heading for c in table.columns][:2] == ["model", "decode [tok/s] ↑"]
    assert column(table, "bound") == ["1,234"]
    assert column(table, "reached") == ["8.1"]
    latency = latency_table([row()])
    assert column(latency, "TTFT") == ["12.3"]
    assert column(latency, "p99") == ["1,500"]


@pytest.mark.parametrize(("share", "said"), [(0.99, "99 %, warm"), (0.2, "20 %, cold"), (None, "—")])
def test_loading_is_split_as_the_engine_reports_it(share, said):
    one = row()
    load = LoadTimes(total_s=12.0, weights_s=4.04, warmup_s=3.0, resident_share=share)
    record = one.record.model_copy(update={"results": one.result.model_copy(update={"load": load})})
    table = load_table([replace(one, record=record)])
    assert [column(table, name) for name in ("load", "weights", "compile", "warm-up", "page cache")] == [
        ["12.0"], ["4.0"], ["—"], ["3.0"], [said],
    ]  # fmt: skip


def test_a_pair_of_eager_and_graphs_is_the_first_that_is_said():
    rows = [row(13.8, eager=True), row(205.0, eager=False)]
    assert speed_table(rows).caption.startswith(
        "CUDA graphs are 14.9× as fast as eager (m, concurrency 1, H100)."
    )
    assert column(speed_table(rows), "mode") == ["eager", "graphs"]
    assert "so launches are not what binds it" in graph_ratios([row(100.0), row(103.0, eager=False)])[0]
    assert graph_ratios([row(13.8), row(205.0, eager=False, concurrency=8)]) == []


def test_hits_and_tokens_are_shown_where_there_is_a_cache():
    table = speed_table([row(size=8, agreement=0.625), row(is_reference=True)])
    assert column(table, "hits") == ["75.0", "—"]
    assert column(table, "same tokens") == ["62.5", "—"]
    assert "uncached arm" in table.caption
    assert "hits" not in [c.title for c in speed_table([row()]).columns]


def test_dummy_weights_are_marked():
    table = speed_table([row(load="dummy"), row(model="other", load="dummy")])
    assert column(table, "model") == ["m (dummy weights)", "other (dummy weights)"]
    assert "Dummy weights" in table.caption


def test_gpu_models_are_columns():
    rows = [row(100.0), row(200.0, device="H200"), row(50.0, size=8)]
    table = device_table(rows)
    assert [c.title for c in table.columns] == ["cache", "H100", "H200"]
    assert table.cells() == [["all", "100.0 ± 2.5", "200.0 ± 2.5"], ["8", "50.0 ± 2.5", "—"]]
    assert device_table([row(), row(size=8)]) is None


def test_failures_have_a_table_of_their_own():
    record = row().record.model_copy(update={"status": "oom", "error": "It does not fit.\nCause: size"})
    table = failure_table([("m, eager", record)])
    assert table.cells() == [["m, eager", "oom", "It does not fit. Cause: size", record.run_id]]


def test_a_forecast_says_what_does_not_fit_and_why_nothing_is_known():
    spec = row().spec
    fitting = Forecast(spec, "vllm", weights_bytes=10, request_bytes=1, device_bytes=12, tokens_per_s=1250.0)
    large = Forecast(spec, "vllm", weights_bytes=10, request_bytes=3, device_bytes=12, tokens_per_s=5.0)
    table = forecast_table([("a", fitting), ("b", large), ("c", Forecast(spec, "torch", absent="GGUF."))])
    assert column(table, "fits") == ["yes", "no", "—"]
    assert column(table, "bound") == ["1,250", "5", "—"]
    assert table.caption.endswith("GGUF.")


@pytest.mark.parametrize("last", [row(205.0), row(150.0, size=128)])
def test_the_pictures_are_drawn(tmp_path, last):
    rows = [row(10.0, size=8), row(20.0, size=64), last]
    png, svg = cache_curves(rows, "caption", tmp_path / "cache")
    text = svg.read_text()
    assert png.stat().st_size > 10_000
    assert "experts of each layer" in text
    png, _svg = mode_bars([row(13.8), row(205.0, eager=False)], "caption", tmp_path / "modes")
    assert png.stat().st_size > 5_000


def test_a_single_repeat_has_a_picture_too(tmp_path):
    rows = [row(10.0, size=8), row(20.0)]
    single = [
        Row(
            r.record.model_copy(
                update={"results": r.result.model_copy(update={"decode_tokens_per_s": one(5.0)})}
            )
        )
        for r in rows
    ]
    assert cache_curves(single, "", tmp_path / "cache")[0].is_file()


def test_rows_from_a_sweep_carry_agreement_and_verdicts(tmp_path):
    from evalsuite.report.speed_rows import speed_rows
    from evalsuite.run.perplexity import Finished

    frames = {"no cache": [1, 2, 3, 4], "cache": [1, 2, 9, 4]}
    finished = []
    for (name, tokens), made in zip(frames.items(), (row(), row(size=8)), strict=True):
        folder = tmp_path / name
        folder.mkdir()
        pd.DataFrame({"repeat": 0, "request": 0, "position": range(4), "token": tokens}).to_parquet(
            folder / "tokens.parquet"
        )
        finished.append(Finished(folder, made.record))
    reference, cached = speed_rows(finished)
    assert (reference.is_reference, reference.agreement) == (True, None)
    assert cached.agreement == 0.5
    assert cached.verdict == "overhead 90 %"


def test_the_gpu_s_number_and_repeats_are_columns_only_to_tell_rows_apart():
    def on(gpu, repeats, **changes):
        found = row(**changes)
        spec = found.spec
        changed = spec.model_copy(
            update={
                "serving": spec.serving.model_copy(update={"gpus": (gpu,)}),
                "workload": spec.workload.model_copy(update={"repeats": repeats}),
            }
        )
        return Row(found.record.model_copy(update={"spec": changed.model_dump(mode="json")}))

    told = speed_table([on(0, 3, size=8), on(1, 5, size=64)])
    assert [c.title for c in told.columns][:2] == ["cache", "decode"]
    assert "3 or 5 repeats" in told.caption
    same = speed_table([on(0, 3, size=8), on(1, 3, size=8)])
    assert column(same, "GPU") == ["0", "1"]


def with_serving(found, **changes):
    spec = found.record.spec | {"serving": found.record.spec["serving"] | changes}
    return replace(found, record=found.record.model_copy(update={"spec": spec}))


def test_kinds_of_cache_and_routing_are_told_apart(tmp_path):
    pinned, disk = row(60.0, size=8), with_serving(row(30.0, size=8), moe_expert_store="disk")
    skewed = with_serving(row(80.0, size=8), moe_routing="zipf:1")
    table = speed_table([row(), pinned, disk, skewed])
    assert column(table, "store") == ["—", "pinned", "disk", "pinned"]
    assert column(table, "routing") == ["by the model"] * 3 + ["Zipf 1"]
    assert "policy lru" in table.caption
    alone = speed_table([skewed])
    assert "experts drawn by Zipf's law with exponent 1" in alone.caption
    assert "store" not in [c.title for c in alone.columns]
    ordered = sorted([disk, skewed, pinned, row()], key=speed_order)
    assert ordered == [disk, pinned, row(), skewed]
    more = [
        with_serving(row(90.0, size=64), **kind)
        for kind in ({}, {"moe_expert_store": "disk"}, {"moe_routing": "zipf:1"})
    ]
    cache_curves([pinned, disk, skewed, *more], "c", tmp_path / "curves")
    labels = (tmp_path / "curves.svg").read_text()
    for name in ("pinned store", "disk store", "Zipf 1"):
        assert name in labels


def test_cells_are_sorted_by_cache_size_with_every_expert_last():
    sizes = [None, 128, 8]
    assert [r.spec.serving.moe_expert_cache_size for r in sorted((row(size=s) for s in sizes), key=speed_order)] == [
        8, 128, None,
    ]  # fmt: skip


def test_checkpoints_of_one_name_are_told_apart_by_their_places():
    def there(place, fingerprint):
        made = row(model=f"{place}/m")
        facts = made.record.model.model_copy(update={"name": "m", "fingerprint": fingerprint})
        return replace(made, record=made.record.model_copy(update={"model": facts}))

    rows = [there("./a", "1"), there("./b", "2")]
    for table in (speed_table(rows), latency_table(rows), load_table(rows)):
        assert column(table, "model") == ["m (./a/m)", "m (./b/m)"]
    assert speed_table([there("./a", "1"), there("./b", "1")]).caption.startswith("m, ")
