"""Records made by hand, and copies of the project's own, in a results folder of a test."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evalsuite.core.cache import CacheCounters, LayerCounters
from evalsuite.core.record import Gpu, Machine, ModelFacts, Record
from evalsuite.core.spec import Serving, SpeedSpec, Workload, spec_hash
from evalsuite.core.speed import Bound, Estimate, LoadTimes, SpeedResult
from evalsuite.core.telemetry import EngineMemory, Telemetry

RESULTS = Path(__file__).resolve().parents[2] / "results"
H100 = Gpu(name="H100", memory_bytes=85_000_000_000)


def machine(driver: str | None = "580.1", vllm: str = "0.26.0") -> Machine:
    return Machine(
        platform="Linux x86_64", cpu="Xeon", cpu_cores=16, ram_bytes=1, gpus=(H100,), gpu_driver=driver,
        python="3.12.3", packages={"vllm": vllm, "torch": "2.11.0"}, git_commit="0123456789abcdef",
        git_dirty=False,
    )  # fmt: skip


def model(name: str = "m", stored: str = "BF16 safetensors", parameters: int = 100) -> ModelFacts:
    return ModelFacts(
        name=name, architecture="Arch", parameters=parameters, vocabulary=257, max_context=4096,
        fingerprint=f"fingerprint-{name}", stored=stored, stored_bytes=2_000_000_000,
        computed="bfloat16 on cuda", dtype="bfloat16", device="cuda:0", device_name="H100",
    )  # fmt: skip


def estimate(mean: float, half: float = 1.0) -> Estimate:
    return Estimate(mean=mean, std=half / 2, low=mean - half, high=mean + half, n=3)


def speed_record(
    name: str = "m",
    decode: float = 100.0,
    *,
    half: float = 1.0,
    size: int | None = None,
    eager: bool = False,
    status: str = "ok",
    stamp: str = "20261101T000000Z",
    stored: str = "BF16 safetensors",
    weights: int = 19_000_000_000,
    **changes: Any,
) -> Record:
    spec = SpeedSpec(
        model=name,
        serving=Serving(engine="vllm", gpus=(0,), enforce_eager=eager, moe_expert_cache_size=size),
        workload=Workload(corpus="builtin", repeats=3),
    )
    counters = None
    if size is not None:
        layer = LayerCounters(
            layer=0, steps=10, hits=size, misses=128 - size, overflow_steps=0, bytes_moved=1
        )
        counters = CacheCounters(
            size=size, experts=128, policy="lru", store="pinned", expert_bytes=1, layers=(layer,)
        )
    result = SpeedResult(
        input_len=512, output_len=128, concurrency=1, repeats=3, warmups=1, ttft_s=estimate(0.02, 0.001),
        tpot_s=estimate(1 / decode, 1e-5), itl_p50_s=0.01, itl_p90_s=0.02, itl_p99_s=0.03,
        decode_tokens_per_s=estimate(decode, half), output_tokens_per_s=estimate(decode - 5),
        prefill_tokens_per_s=estimate(9000.0), load=LoadTimes(total_s=40.0, weights_s=30.0),
        bound=Bound(
            bytes_per_token=10, transfer_bytes_per_token=5_000_000, bandwidth_bytes_per_s=1e12,
            transfer_bandwidth_bytes_per_s=1e10, tokens_per_s=1000.0, share=decode / 1000,
        ),
    )  # fmt: skip
    ok = status == "ok"
    digest = spec_hash(spec)
    fields: dict[str, Any] = {
        "run_id": f"{name}/speed-{stamp}-{digest}", "kind": "speed", "status": status,
        "started": "2026-11-01T00:00:00+00:00", "finished": "2026-11-01T00:01:00+00:00",
        "spec": spec.model_dump(mode="json"), "spec_hash": digest, "machine": machine(),
        "model": model(name, stored) if ok else None, "results": result if ok else None,
        "expert_cache": counters if ok else None,
        "engaged": {"engine": "vllm", "mode": "eager" if eager else "graphs"},
        "error": None if ok else "CUDA out of memory.\nmore",
        "telemetry": Telemetry(
            rss_peak_bytes=3_000_000_000, gpu_process_peak_bytes=78_000_000_000,
            engine=EngineMemory(weights_bytes=weights, kv_cache_bytes=50_000_000_000),
        ),
    }  # fmt: skip
    return Record(**(fields | changes))


def store(root: Path, *records: Record) -> Path:
    """A results folder with these records; a speed cell has tokens, so that cells can be compared."""
    for record in records:
        folder = root / record.run_id
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(record.model_dump_json())
        if record.kind == "speed" and record.status == "ok":
            tokens = {"repeat": 0, "request": 0, "position": np.arange(4), "token": np.arange(4)}
            pd.DataFrame(tokens).to_parquet(folder / "tokens.parquet")
    return root


def copy_runs(root: Path, *patterns: str) -> Path:
    """Copies of the project's own finished runs, by pattern below ``results/``."""
    for pattern in patterns:
        found = sorted(RESULTS.glob(pattern))
        assert found, pattern
        for run in found:
            shutil.copytree(run, root / run.relative_to(RESULTS))
    return root


def edit(folder: Path, change: Any) -> None:
    """Change the record of a run folder: `change` is given its JSON."""
    data = json.loads((folder / "run.json").read_text())
    change(data)
    (folder / "run.json").write_text(json.dumps(data))
