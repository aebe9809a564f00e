"""Decode speed of stock vLLM with the expert cache, beside the bound of the bytes that must be copied.

    python experiments/benchmarks/expert_cache_vllm.py --out FILE.json \\
        [--geometry experiments/geometry/qwen3.5-35b-a3b-int4] [--sizes all,8,64,128] \\
        [--modes graphs,eager] [--routing uniform_random,zipf:1.0,model] [--policies lru] [--stores pinned]

One GPU, batch 1, random weights in the geometry of a config.json. With t0 the time of a decoded token with
every expert on the device and CUDA graphs (the cell `all graphs`), m the measured misses a token, and B the
measured copy bandwidth from pinned memory,

    bound = 1 / (t0 + m · expert bytes / B)      m = (1 − h) · layers · top-k, less what a step routes twice

Routing decides the hit rate h, so each row names it: `uniform_random` is vLLM's own simulation (with
replacement), `zipf:S` draws top-k different experts of every token with probabilities ∝ rank^−S, independent
of the token before, and `model` is the random router itself, which is deterministic: its rows compare their
tokens with the tokens of every expert resident. Sizes of one routing, mode, policy and store share an engine
in a process of its own; FILE.json is written after each, and cells that it has already are not run again.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
INPUT_LEN, REPEATS = 64, 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", type=Path, default=ROOT / "experiments/geometry/qwen3.5-35b-a3b-int4")
    parser.add_argument("--sizes", default="all,8,64,128")
    parser.add_argument("--modes", default="graphs,eager")
    parser.add_argument("--routing", default="uniform_random")
    parser.add_argument("--policies", default="lru")
    parser.add_argument("--stores", default="pinned")
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.6)
    parser.add_argument("--profile", action="store_true", help="add the GPU kernels that take longest")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cells", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cells:
        for row in run_cells(json.loads(arguments.cells), arguments):
            print("CELL " + json.dumps(row), flush=True)
        return
    rows: list[dict[str, Any]] = (
        json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else []
    )
    log = arguments.out.with_suffix(".log")
    for cells in plan(arguments):
        left = [cell for cell in cells if not is_done(rows, cell)]
        if not left:
            continue
        command = [sys.executable, __file__, *sys.argv[1:], "--cells", json.dumps(left)]
        with log.open("a") as errors, subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment(left[0])
        ) as engine:  # fmt: skip
            assert engine.stdout is not None
            for line in engine.stdout:
                if line.startswith("CELL "):
                    keep(rows, json.loads(line[5:]), arguments)
                else:
                    errors.write(line)
        for cell in left:
            if not is_done(rows, cell):
                keep(rows, cell | {"error": f"exit {engine.returncode}, see {log.name}"}, arguments)


def is_done(rows: list[dict[str, Any]], cell: dict[str, Any]) -> bool:
    return any("error" not in row and all(row.get(k) == v for k, v in cell.items()) for row in rows)


def keep(rows: list[dict[str, Any]], row: dict[str, Any], arguments: argparse.Namespace) -> None:
    rows.append(row)
    add_bounds(rows)
    arguments.out.write_text(json.dumps({"geometry": arguments.geometry.name, "rows": rows}, indent=1))
    print(json.dumps({k: v for k, v in row.items() if k not in ("tokens", "profile")}), flush=True)


def plan(arguments: argparse.Namespace) -> list[list[dict[str, Any]]]:
    """Cells that share an engine, which goes through all sizes."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for routing in arguments.routing.split(","):
        for mode in arguments.modes.split(","):
            for size in arguments.sizes.split(","):
                for policy in arguments.policies.split(",") if size != "all" else [""]:
                    for store in arguments.stores.split(",") if size != "all" else [""]:
                        cell = {
                            "routing": routing, "mode": mode, "size": size, "policy": policy, "store": store,
                        }  # fmt: skip
                        groups.setdefault((routing, mode, policy, store), []).append(cell)
    return list(groups.values())


def environment(cell: dict[str, Any]) -> dict[str, str]:
    ours = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    if cell["routing"] != "model":
        ours["VLLM_MOE_ROUTING_SIMULATION_STRATEGY"] = cell["routing"]
    return os.environ | ours


def run_cells(cells: list[dict[str, Any]], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Start one engine and time it at every size."""
    from vllm import LLM
    from vllm.engine import arg_utils  # noqa: F401 (what the plugin extends)

    from evalsuite.engines.vllm_plugin import client, register

    register()
    first = cells[0]
    prepare(first["routing"])
    additional: dict[str, Any] = {"gdn_prefill_backend": "triton"}
    if first["size"] != "all":
        additional |= {
            "moe_expert_cache_size": int(first["size"]), "moe_expert_cache_policy": first["policy"],
            "moe_expert_store": first["store"],
        }  # fmt: skip
    began = time.perf_counter()
    llm = LLM(
        model=str(arguments.geometry), load_format="dummy", skip_tokenizer_init=True,
        language_model_only=True,
        max_model_len=2048, max_num_seqs=4, max_num_batched_tokens=2048, enable_prefix_caching=False, seed=0,
        enforce_eager=first["mode"] == "eager", additional_config=additional,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        compilation_config={"cudagraph_capture_sizes": [1, 2, 4]},
    )  # fmt: skip
    load_s = time.perf_counter() - began
    for cell in cells:
        began = time.perf_counter()
        if cell is not first:
            client.resize(llm, int(cell["size"]))
        resize_s = time.perf_counter() - began
        yield cell | {"load_s": load_s, "resize_s": resize_s} | run_cell(llm, cell, arguments)


def run_cell(llm: Any, cell: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Time one size."""
    import torch
    from vllm import SamplingParams

    cached = cell["size"] != "all"
    result: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    prompt = {"prompt_token_ids": [(37 * i + 11) % 1000 for i in range(INPUT_LEN)]}

    def timed(output_len: int) -> tuple[float, list[int], dict[str, int]]:
        if cached:
            llm.collective_rpc("reset_expert_cache_counters")
        params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False)
        torch.cuda.synchronize()
        start = time.perf_counter()
        (answer,) = llm.generate([prompt], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        counts = {}
        if cached:
            (c,) = llm.collective_rpc("expert_cache_counters")
            result["expert_bytes"], result["layers"] = c["expert_bytes"], len(c["layers"])
            counts = {k: sum(layer[k] for layer in c["layers"]) for k in ("hits", "misses", "overflow_steps")}
        return seconds, list(answer.outputs[0].token_ids), counts

    for _ in range(2):
        timed(16)
    short = [timed(1) for _ in range(REPEATS)]
    long = [timed(1 + arguments.output_len) for _ in range(REPEATS)]
    result["ttft_s"] = [t for t, _, _ in short]
    mean_short = sum(result["ttft_s"]) / REPEATS
    result["tpot_s"] = [(t - mean_short) / arguments.output_len for t, _, _ in long]
    result["decode_tokens_per_s"] = REPEATS / sum(result["tpot_s"])
    result["tokens"] = long[-1][1]
    if cached:
        sums = {k: sum(c[k] for *_, c in long) - sum(c[k] for *_, c in short) for k in short[0][2]}
        result |= sums
        result["hit_rate"] = sums["hits"] / (sums["hits"] + sums["misses"])
        result["misses_per_token"] = sums["misses"] / (REPEATS * arguments.output_len)
    result["copy_bytes_per_s"] = copy_bandwidth()
    result["allocated_bytes"] = torch.cuda.max_memory_allocated()
    result["model_bytes"] = sum(model_bytes(llm))
    if arguments.profile:
        result["profile"] = profile(lambda: timed(33))
    return result


def prepare(routing: str) -> None:
    """The routing that a cell asks for, and dummy weights that are the same with and without a cache."""
    import torch
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    from evalsuite.engines import vllm_zipf

    vllm_zipf.install(routing)

    generator = torch.Generator().manual_seed(1)
    count = (1 << 24) + 7919  # no multiple of a row, so that experts differ
    floats = (torch.rand(count, generator=generator) * 0.04 - 0.02).to(torch.bfloat16)
    words = torch.randint(-(2**31), 2**31, (count,), generator=generator, dtype=torch.int32)
    on_device: dict[Any, Any] = {}

    def fill(_: Any, model: Any, *__: Any) -> None:
        for name, parameter in model.named_parameters():
            integer = not parameter.is_floating_point()
            if integer and "packed" not in name:
                continue
            key = (integer, parameter.dtype, parameter.device)
            if key not in on_device:
                on_device[key] = (words if integer else floats).to(parameter.dtype).to(parameter.device)
            flat = parameter.data.view(-1)
            for start in range(0, flat.numel(), count):
                part = flat[start : start + count]
                part.copy_(on_device[key][: len(part)])
        on_device.clear()

    DummyModelLoader.load_weights = fill


def copy_bandwidth() -> float:
    """Bytes/s from pinned memory to the device, 1 GiB in one copy, the best of five."""
    import torch

    source = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    best = 0.0
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        best = max(best, source.nbytes / (time.perf_counter() - start))
    return best


def model_bytes(llm: Any) -> list[int]:
    """Bytes on the device of the parameters and of the slots."""

    def count(worker: Any) -> int:
        seen: dict[int, int] = {}
        for module in worker.model_runner.get_model().modules():
            cache = getattr(getattr(module, "quant_method", None), "cache", None)
            tensors = [
                *module.parameters(recurse=False),
                *(cache.slots.values() if cache is not None else ()),
            ]
            seen |= {t.data_ptr(): t.nbytes for t in tensors if t.is_cuda}
        return sum(seen.values())

    return llm.collective_rpc(count)


def profile(work: Any) -> list[dict[str, Any]]:
    """The kernels of a run, longest in sum first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    with profiled(activities=[ProfilerActivity.CUDA]) as trace:
        work()
    events = sorted(trace.key_averages(), key=lambda event: -event.self_device_time_total)
    return [
        {"kernel": e.key[:90], "calls": e.count, "ms": e.self_device_time_total / 1e3} for e in events[:25]
    ]


def add_bounds(rows: list[dict[str, Any]]) -> None:
    """Fill in what needs the row of every expert resident: the bound, the share of it, equal tokens."""
    for row in rows:
        if "error" in row or row["size"] == "all":
            continue
        resident = [
            r for r in rows if "error" not in r and r["size"] == "all" and r["routing"] == row["routing"]
        ]
        for other in resident:
            if other["mode"] == row["mode"] and row["routing"] == "model":
                pairs = list(zip(row["tokens"], other["tokens"], strict=True))
                row["equal_tokens"] = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
            if other["mode"] == "graphs" and other["device"] == row["device"]:
                t0 = 1 / other["decode_tokens_per_s"]
                transfer = row["misses_per_token"] * row["expert_bytes"] / row["copy_bytes_per_s"]
                row["t0_s"], row["transfer_s"] = t0, transfer
                row["bound_tokens_per_s"] = 1 / (t0 + transfer)
                row["share_of_bound"] = row["decode_tokens_per_s"] * (t0 + transfer)


if __name__ == "__main__":
    main()
