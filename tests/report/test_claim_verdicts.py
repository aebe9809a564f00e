"""Claims against records: which runs count, what they say, and the rendered tables."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from evalsuite.core.cache import CacheCounters, LayerCounters
from evalsuite.core.record import Gpu, Machine, ModelFacts, PerplexityResult, Record, TextFacts
from evalsuite.core.spec import FootprintSpec, PerplexitySpec, Serving, SpeedSpec, Workload
from evalsuite.core.speed import Estimate, FootprintResult, LoadTimes, SpeedResult
from evalsuite.core.telemetry import EngineMemory, Telemetry
from evalsuite.report.claim_tables import claim_tables, document, summary
from evalsuite.report.claim_verdicts import VERDICTS, Judged, judge
from evalsuite.report.claims import Claims
from report.claims_files import claim, shipped, small

GOLDEN = Path(__file__).parents[1] / "golden"
PRO = "NVIDIA RTX PRO 6000 Blackwell Server Edition"
ON_PRO = {"gpu": "RTX PRO 6000", "cache": "all"}


def model(name: str = "owner/m", **changes: Any) -> ModelFacts:
    data = {
        "name": name, "architecture": "Qwen3_5MoeForCausalLM", "parameters": 34_660_610_688, "vocabulary": 248_320,
        "max_context": 4096, "fingerprint": "f" * 64, "stored": "INT4 safetensors", "stored_bytes": 19_450_000_000,
        "computed": "bfloat16 on cuda", "dtype": "bfloat16", "device": "cuda", "device_name": PRO,
    }  # fmt: skip
    return ModelFacts.model_validate(data | changes)


def record(spec: Any, result: Any, gpu: str | None = PRO, **changes: Any) -> Record:
    gpus = () if gpu is None else (Gpu(name=gpu, memory_bytes=102_000_000_000),)
    data = {
        "run_id": f"{spec.kind}-run", "kind": spec.kind, "status": "ok", "started": "t", "finished": "t",
        "spec": spec.model_dump(mode="json"), "spec_hash": "h", "results": result, "model": model(),
        "machine": Machine(
            platform="Linux", cpu="c", cpu_cores=2, ram_bytes=1, gpus=gpus, python="3.11", packages={}
        ),
        "telemetry": Telemetry(
            rss_peak_bytes=7_000_000_000, gpu_process_peak_bytes=71_000_000_000,
            engine=EngineMemory(weights_bytes=19_600_000_000, allocated_peak_bytes=24_500_000_000),
        ),
    }  # fmt: skip
    return Record.model_validate(data | changes)


def speed(
    tokens_per_s: float, gpu: str | None = PRO, of: str = "owner/m", changes: Any = None, **serving: Any
) -> Record:
    def estimate(mean: float) -> Estimate:
        return Estimate(mean=mean, std=None, low=None, high=None, n=1)

    spec = SpeedSpec(model=of, serving=Serving(**serving), workload=Workload(corpus="builtin"))
    result = SpeedResult(
        input_len=512, output_len=128, concurrency=1, repeats=1, warmups=0, ttft_s=estimate(0.1),
        tpot_s=estimate(1 / tokens_per_s), itl_p50_s=0.1, itl_p90_s=0.1, itl_p99_s=0.1,
        decode_tokens_per_s=estimate(tokens_per_s * 1.3), output_tokens_per_s=estimate(tokens_per_s),
        prefill_tokens_per_s=estimate(1000), load=LoadTimes(total_s=170),
    )  # fmt: skip
    return record(spec, result, gpu, **{"model": model(of)} | (changes or {}))


def one(claims: Claims, *records: Record) -> Judged:
    return judge(claims, records)[0]


def test_a_run_under_the_same_conditions_decides():
    claims = small(claim("a", value=23.6, **ON_PRO))
    assert one(claims, speed(24)).verdict == "holds"
    near = one(claims, speed(40))
    assert (near.verdict, near.origin, near.shown, near.runs) == (
        "fails",
        "measured",
        "40 tok/s",
        ("speed-run",),
    )
    assert "decode 52 tok/s" in near.why, "the card does not say which speed it means"
    assert one(claims, speed(23.6 / 1.3)).verdict == "holds", "its decode speed agrees"


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (speed(24, gpu="NVIDIA H100 80GB HBM3"), "gpu NVIDIA H100"),
        (speed(24, gpu=None), "gpu unknown"),
        (speed(24, moe_expert_cache_size=8), "cache 8, not all"),
        (speed(24, changes={"status": "failed"}), "no run of this model"),
        (
            speed(24, of="someone/else"),
            "no run of this",
        ),
    ],
)
def test_runs_under_other_conditions_decide_nothing(run: Record, reason: str):
    item = one(small(claim("a", value=24, **ON_PRO)), run)
    assert item.verdict == "not measured"
    assert reason in item.why


def test_a_run_that_shared_its_gpu_decides_no_speed():
    beside = Telemetry(rss_peak_bytes=None, neighbours=("GPU 0: another process used it",))
    claims = small(claim("a", value=24, **ON_PRO))
    assert one(claims, speed(24, changes={"telemetry": beside})).verdict == "not measured"
    assert one(claims, speed(24)).verdict == "holds"


def test_what_a_claim_leaves_open_is_open_and_what_it_states_is_not():
    runs = [speed(15, enforce_eager=True), speed(205)]
    said = {"value": 16.2, **ON_PRO}
    assert one(small(claim("a", **said)), *runs).shown == "15 tok/s"
    assert one(small(claim("a", **said, mode="graphs")), *runs).shown == "205 tok/s"
    assert one(small(claim("a", **said, mode="eager", context=4096)), *runs).shown == "15 tok/s"


def test_a_claim_without_its_deciding_conditions_cannot_be_compared():
    item = one(small(claim("a", value=24)), speed(24))
    assert (item.verdict, item.why) == ("not measured", "the card does not say which gpu and cache")


def test_dummy_weights_serve_speed_and_say_so_until_real_ones_are_measured():
    dummy = speed(24, load_format="dummy")
    claims = small(claim("a", value=23.6, **ON_PRO), claim("b", "download", 19.5, "GB"))
    first, download = judge(claims, [dummy])
    assert first.verdict == "holds"
    assert "dummy weights" in first.why
    assert download.origin == "derived", "random weights have no files"
    assert one(claims, dummy, speed(40)).verdict == "fails"


def test_dummy_weights_say_nothing_of_a_cached_speed():
    claims = small(claim("a", value=24, gpu="RTX PRO 6000", cache=64))
    item = one(claims, speed(24, load_format="dummy", moe_expert_cache_size=64))
    assert item.verdict == "not measured"
    assert "choose other experts" in item.why
    assert one(claims, speed(24, moe_expert_cache_size=64)).verdict == "holds"


def test_a_stand_in_counts_only_with_dummy_weights():
    models = {"m": {"title": "M", "stand_ins": ["geometry-only"], "stored": "INT4"}}
    claims = small(claim("a", value=24, **ON_PRO), models=models)
    assert one(claims, speed(24, of="geometry-only", load_format="dummy")).verdict == "holds"
    assert one(claims, speed(24, of="geometry-only")).verdict == "not measured"


def test_a_fingerprint_is_a_name():
    models = {"m": {"title": "M", "fingerprints": ["f" * 64]}}
    claims = small(claim("a", value=24, **ON_PRO), models=models)
    assert one(claims, speed(24, of="/somewhere/else")).verdict == "holds"


def test_a_measured_ratio_is_that_of_the_measured_parts():
    bf16 = speed(100, of="owner/b")
    models = {"m": {"title": "M", "names": ["owner/m"]}, "b": {"title": "B", "names": ["owner/b"]}}
    claims = small(
        claim("a", value=24, **ON_PRO), claim("b", model="b", value=16, **ON_PRO),
        claim("r", "ratio", 1.5, "x", of=["a", "b"], quote="1.5x"), models=models,
    )  # fmt: skip
    ratio = judge(claims, [speed(150), bf16])[2]
    assert (ratio.verdict, ratio.shown) == ("holds", "1.5×")
    assert judge(claims, [speed(24), bf16])[2].verdict == "fails"
    assert judge(claims, [speed(24)])[2].verdict == "not measured"


def perplexity(value: float, corpus: str = "wikitext-2", cache: int | None = None) -> Record:
    golden = Record.model_validate_json((GOLDEN / "record.json").read_text())
    assert isinstance(golden.results, PerplexityResult)
    assert isinstance(golden.text, TextFacts)
    assert golden.protocol is not None
    spec = PerplexitySpec(
        model="owner/m", corpus=corpus, protocol=golden.protocol, moe_expert_cache_size=cache
    )
    result = golden.results.model_copy(update={"perplexity": value})
    text = golden.text.model_copy(update={"corpus": corpus})
    return record(spec, result, protocol=golden.protocol, text=text)


def test_what_two_gpus_did_together_is_no_speed_of_one_and_the_same_perplexity():
    claims = small(claim("a", value=23.6, **ON_PRO))
    judged = one(claims, speed(24, tensor_parallel_size=2))
    assert judged.verdict == "not measured"
    assert "measured under other conditions: over 2 GPUs" in judged.why
    run = perplexity(6.6)
    shared = run.model_copy(update={"spec": run.spec | {"tensor_parallel_size": 2}})
    said = small(claim("a", "perplexity", 6.6, "", windows=1155, text="wikitext-2"))
    assert one(said, shared).verdict == "holds"


def test_perplexity_is_compared_over_the_same_windows_of_the_same_text():
    def said(value: float, windows: int, **keys: Any) -> Claims:
        return small(claim("a", "perplexity", value, "", windows=windows, text="wikitext-2", **keys))

    run = perplexity(6.60)
    assert isinstance(run.results, PerplexityResult)
    first = run.results.prefixes[0]
    assert one(said(6.56, 1155), run).verdict == "holds"
    assert one(said(6.56, 1155), perplexity(6.9)).verdict == "fails"
    assert one(said(first.perplexity, first.stop), run).shown == f"{first.perplexity:.3g} PPL".removesuffix(
        " PPL"
    )
    assert one(said(6.56, 1153), run).verdict == "not measured"
    assert one(said(6.56, 1155), perplexity(6.6, corpus="builtin")).verdict == "not measured"
    assert one(said(6.56, 1155, cache=8), run).verdict == "not measured"
    assert one(said(6.56, 1155, cache=8), perplexity(6.6, cache=8)).verdict == "holds"
    windows = one(small(claim("w", "windows", 1155, "", text="wikitext-2")), run)
    assert (windows.verdict, windows.origin) == ("holds", "measured")


def test_memory_disk_load_and_overflow_come_from_their_records():
    spec = FootprintSpec(model="owner/m", workload=Workload(corpus="builtin"))
    result = FootprintResult(
        checkpoint_bytes=19_450_000_000, disk_bytes={"checkpoint": 20_000_000_000, "expert_files": 31_000_000_000, "hub_cache": 90_000_000_000},
        load=LoadTimes(total_s=170), input_len=64, output_len=8,
    )  # fmt: skip
    layer = LayerCounters(layer=0, steps=10, hits=1, misses=9, overflow_steps=4, bytes_moved=1)
    counters = CacheCounters(
        size=8, experts=256, policy="lru", store="disk", expert_bytes=1_622_016, layers=(layer,) * 40
    )
    plain = record(spec, result)
    cached = record(
        FootprintSpec(model="owner/m", serving=Serving(moe_expert_cache_size=8), workload=spec.workload), result,
        expert_cache=counters,
    )  # fmt: skip
    expected = {
        ("vram", 25, "GB", "cache", "all"): "holds",  # the framework's peak; NVML's is 71 GB
        ("vram", 40, "GB", "cache", "all"): "fails",
        ("load", 165, "s", "gpu", "RTX PRO 6000"): "not measured",
        ("download", 19.5, "GB", "policy", None): "holds",
        ("disk", 20, "GB", "component", "hub cache"): "holds",
        ("disk", 51, "GB", "component", "peak"): "holds",
        ("disk", 51, "GB", "component", "swap"): "not measured",
        ("host_ram", 7, "GB", "component", "used"): "holds",
        ("host_ram", 167, "GB", "component", "page cache"): "not measured",
        ("overflow", 100, "%", "cache", 8): "fails",
        ("expert_buffer", 0.52, "GB", "cache", 8): "holds",
    }
    for (metric, value, unit, key, condition), verdict in expected.items():
        item = one(small(claim("a", metric, value, unit, **{key: condition})), plain, cached)
        assert item.verdict == verdict, (metric, value, item.why)
    assert one(small(claim("a", "overflow", 100, "%", cache=8)), cached).shown == "40 %"
    assert one(small(claim("a", "load", 165, "s", **ON_PRO)), plain).verdict == "holds"


def tables(claims: Claims, *records: Record) -> str:
    judged = judge(claims, records)
    parts = [f"## {table.title}\n\n{table.to_markdown()}" for table in claim_tables(claims, judged)]
    return "\n\n".join((*parts, summary(judged))) + "\n"


def test_the_golden_tables_of_the_shipped_claims():
    """HLWQ_EVAL_GOLDEN=write writes the file anew; read the difference before you keep it."""
    text, path = tables(shipped()), GOLDEN / "claims_qwopus.md"
    if os.environ.get("HLWQ_EVAL_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()


def test_markup_in_a_card_stays_text():
    hostile = claim("a", words="<script>|*x*`", where="a | b", cache="all")
    claims = small(hostile, card={"title": "<b>T</b>|", "source": "s"})
    text = tables(claims)
    assert "\\<script>\\|\\*x\\*\\`" in text
    assert "a \\| b" in text
    for line in text.splitlines():
        if line.startswith("| a "):
            assert line.replace("\\|", "").count("|") in (4, 6)


def test_the_document_holds_everything_and_no_nan():
    claims = shipped()
    judged = judge(claims, [speed(24)])
    data = json.loads(json.dumps(document(claims, judged, ["left out: x"]), allow_nan=False))
    assert sum(data["counts"].values()) == len(claims.claim) == len(data["claims"])
    assert tuple(data["counts"]) == VERDICTS
    assert data["skipped_records"] == ["left out: x"]
    by_id = {entry["id"]: entry for entry in data["claims"]}
    assert by_id["arch-layers"]["rules"] == ["layers_against_files"]
    assert by_id["tune-64-speed"]["to_measure"].endswith("--cache-sizes 64 --modes eager")
    assert all(entry["quote"] and entry["where"] for entry in data["claims"])


def test_one_sweep_measures_many_claims():
    said = [
        claim("a", value=20, cache=64, gpu="RTX 4090", mode="eager"),
        claim("b", value=30, cache="all", gpu="RTX 4090"),
        claim("c", value=30, cache=8, gpu="RTX 4090", policy="lfru"),
        claim("d", "download", 19, "GB", model="other"),
    ]
    claims = small(*said)
    table = list(claim_tables(claims, judge(claims)))[-1]
    assert table.cells() == [
        ["hlwq-eval speed owner/m --cache-sizes 8,64,all --moe-expert-cache-policy lfru", "RTX 4090", "3"]
    ], "and nothing for a model whose checkpoint the card does not name"
    eager = small(said[0])
    assert (
        list(claim_tables(eager, judge(eager)))[-1].cells()[0][0].endswith("--cache-sizes 64 --modes eager")
    )


def test_every_claim_is_in_exactly_one_table_of_verdicts():
    claims = shipped()
    judged = judge(claims)
    shown: list[str] = []
    for table in claim_tables(claims, judged):
        if "why" in [column.title for column in table.columns]:
            shown += [item.claim.id for group in table.rows for item in group]
    assert sorted(shown) == sorted(c.id for c in claims.claim)
