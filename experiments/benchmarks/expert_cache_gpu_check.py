"""Is the expert cache right on this GPU? Tiny random models, with the cache against without, in two minutes.

    python experiments/benchmarks/expert_cache_gpu_check.py --out FILE.json [--kinds int4,bf16] \\
        [--modes eager,graphs] [--policies lru,lfru] [--sizes 1,4,8,16,31] [--stores pinned,disk]

Runs anywhere that vLLM runs, installed or beside the repository on PYTHONPATH; everything is in one process
(VLLM_ENABLE_V1_MULTIPROCESSING=0), so that a call registers the plugin. For INT4 (Marlin) and BF16 experts,
eager and with CUDA graphs, at every cache size: greedy tokens and prompt log-probabilities against no cache,
and in eager mode counters against the policies replayed over the routing of the same steps. One engine goes
through all sizes; CUDA graphs are captured again for each.

A step that fits computes what it would without a cache, so its differences should be 0; a step that needs
several groups adds bfloat16 sums in another order, and where two experts of these random routers are almost
tied a token then goes elsewhere. Mean and largest differences in nats stand beside those between two runs
without a cache, one prompt at a time and all at once.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.engine import arg_utils  # noqa: E402, F401  (what the plugin extends)
from vllm_cpu.tiny_moe import write_tiny_moe  # noqa: E402

from evalsuite.engines.vllm_plugin import client, register  # noqa: E402
from evalsuite.engines.vllm_plugin.layers import CachedExperts  # noqa: E402
from evalsuite.experts.policy import make_policy  # noqa: E402

EXPERTS, TOP_K, VOCABULARY = 32, 4, 512
SIZES = [1, TOP_K, 8, 16, EXPERTS - 1]
PROMPTS = [[(7 * i + 3 * j * j) % VOCABULARY for i in range(n)] for j, n in enumerate((1, 2, 5, 24, 90))]


def start(folder: Path, graphs: bool, **cache: Any) -> LLM:
    on_gpu = torch.cuda.is_available()
    return LLM(
        model=str(folder), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=256, max_num_seqs=8,
        max_num_batched_tokens=256, enforce_eager=not graphs, enable_prefix_caching=False, seed=0,
        additional_config={f"moe_expert_{name}": value for name, value in cache.items()},
        **({"gpu_memory_utilization": 0.25} if on_gpu else {}),
        **({"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8]}} if graphs else {}),
    )  # fmt: skip


def stop(llm: LLM) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


Answers = list[tuple[list[int], list[float]]]


def answers(llm: LLM, together: bool) -> Answers:
    """Greedy tokens of each prompt, and the log-probabilities of its tokens."""
    params = SamplingParams(
        temperature=0, max_tokens=16, ignore_eos=True, prompt_logprobs=0, detokenize=False
    )
    found: Answers = []
    for batch in [PROMPTS] if together else [[prompt] for prompt in PROMPTS]:
        outputs = llm.generate([{"prompt_token_ids": p} for p in batch], params, use_tqdm=False)
        for prompt, output in zip(batch, outputs, strict=True):
            pairs = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
            found.append((list(output.outputs[0].token_ids), [entry[t].logprob for t, entry in pairs]))
    return found


def methods(llm: LLM) -> list[Any]:
    """The cached MoE methods of every layer; the worker is in this process."""
    found: list[Any] = []

    def collect(worker: Any) -> None:
        model = worker.model_runner.get_model()
        found.extend(
            m
            for module in model.modules()
            if isinstance(m := getattr(module, "quant_method", None), CachedExperts)
        )

    llm.collective_rpc(collect)
    return found


def record(llm: LLM) -> list[list[torch.Tensor]]:
    """From now on, the routed experts of every step of every layer, on the device; eager only."""
    traces: list[list[torch.Tensor]] = []
    for method in methods(llm):
        trace: list[torch.Tensor] = []
        apply = method.apply

        def recorded(_apply: Any = apply, _trace: Any = trace, **arguments: Any) -> Any:
            _trace.append(arguments["topk_ids"].clone())
            return _apply(**arguments)

        method.apply = recorded
        traces.append(trace)
    return traces


def counted_by_rule(traces: list[list[torch.Tensor]], size: int, policy: str) -> list[tuple[int, ...]]:
    """(steps, hits, misses, overflow steps) of each layer by `evalsuite.experts.policy`."""
    counts = []
    for trace in traces:
        rule = make_policy(policy, size, EXPERTS)
        hits = misses = overflows = 0
        for ids in trace:
            wanted = ids.unique().tolist()
            overflows += len(wanted) > size
            for placement in rule.serve(wanted):
                hits += placement.hits
                misses += len(placement.loads)
        counts.append((len(trace), hits, misses, overflows))
    return counts


def counted(llm: LLM) -> list[tuple[int, ...]]:
    (counters,) = llm.collective_rpc("expert_cache_counters")
    return [(c["steps"], c["hits"], c["misses"], c["overflow_steps"]) for c in counters["layers"]]


def compare(
    row: dict[str, Any], mine: Answers, baseline: Answers, fitting: int | None = None
) -> dict[str, Any]:
    """Differences over all prompts, and over those whose every step fits into `fitting` slots."""

    def differences(pairs: list[tuple[Any, Any]]) -> tuple[float, float, int]:
        nats = [abs(a - b) for m, o in pairs for a, b in zip(m[1], o[1], strict=True)]
        same = sum(m[0] == o[0] for m, o in pairs)
        return (max(nats, default=0.0), sum(nats) / max(1, len(nats)), len(pairs) - same)

    pairs = list(zip(mine, baseline, strict=True))
    largest, mean, changed = differences(pairs)
    row |= {"mean_nats": mean, "max_nats": largest, "changed_answers": f"{changed} of {len(pairs)}"}
    if fitting is not None:
        fit = [p for p, prompt in zip(pairs, PROMPTS, strict=True) if len(prompt) * TOP_K <= fitting]
        largest, _, changed = differences(fit)
        row |= {"fitting": len(fit), "fitting_max_nats": largest, "fitting_changed": changed}
    return row


def check(kind: str, folder: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every row of one kind of experts."""
    alone_counts: dict[tuple[str, int], Any] = {}
    if "eager" in arguments.modes:
        alone, together = yield from baseline(kind, "eager", folder)
        for llm, row in cached(kind, folder, "eager", arguments):
            policy, size = row["policy"], row["size"]
            traces = record(llm)
            mine = answers(llm, together=False)
            alone_counts[policy, size] = counted(llm)
            mine_together = answers(llm, together=True)
            counts = counted(llm)
            row["counters_right"] = counts == counted_by_rule(traces, size, policy)
            row["hit_rate"] = sum(c[1] for c in counts) / sum(c[1] + c[2] for c in counts)
            yield compare(row | {"what": "alone"}, mine, alone, size)
            yield compare(row | {"what": "together"}, mine_together, together)
            for method in methods(llm):
                del method.apply
    if "graphs" in arguments.modes:
        alone, together = yield from baseline(kind, "graphs", folder)
        for llm, row in cached(kind, folder, "graphs", arguments):
            policy, size = row["policy"], row["size"]
            mine = answers(llm, together=False)
            if (policy, size) in alone_counts:
                row["counters_as_eager"] = counted(llm) == alone_counts[policy, size]
            yield compare(row | {"what": "alone"}, mine, alone, size)
            yield compare(row | {"what": "together"}, answers(llm, together=True), together)


def cached(
    kind: str, folder: Path, mode: str, arguments: argparse.Namespace
) -> Iterator[tuple[LLM, dict[str, Any]]]:
    """One engine for each store and policy, at one size after the other, and the beginning of its row."""
    for store in arguments.stores:
        for policy in arguments.policies if store == "pinned" else arguments.policies[:1]:
            first = arguments.sizes[0]
            llm = start(folder, mode == "graphs", cache_size=first, cache_policy=policy, store=store)
            for size in arguments.sizes:
                client.resize(llm, size)
                yield llm, {"kind": kind, "mode": mode, "policy": policy, "store": store, "size": size}
            stop(llm)


def baseline(kind: str, mode: str, folder: Path) -> Generator[dict[str, Any], None, tuple[Answers, Answers]]:
    """Answers without a cache, one prompt at a time and all at once; two rows on how far those agree."""
    llm = start(folder, mode == "graphs")
    alone, together = answers(llm, together=False), answers(llm, together=True)
    row = {"kind": kind, "mode": mode}
    yield compare(row | {"what": "no cache, again"}, answers(llm, together=False), alone)
    yield compare(row | {"what": "no cache, together"}, together, alone)
    stop(llm)
    return alone, together


def faulty(row: dict[str, Any], tolerance_nats: float) -> bool:
    wrong_counts = not (row.get("counters_right", True) and row.get("counters_as_eager", True))
    differs = row.get("fitting_max_nats", 0) > tolerance_nats or row.get("fitting_changed", 0) > 0
    return wrong_counts or differs or row["mean_nats"] > 0.2


def summary(rows: list[dict[str, Any]], began: float) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "seconds": time.perf_counter() - began,
        "faults": sum(row["faulty"] for row in rows),
        "rows": rows,
    }


def names(text: str) -> list[str]:
    return text.split(",")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", type=names, default=["int4", "bf16"])
    parser.add_argument("--modes", type=names, default=["eager", "graphs"])
    parser.add_argument("--policies", type=names, default=["lru", "lfru"])
    parser.add_argument("--sizes", type=lambda text: [int(size) for size in text.split(",")], default=SIZES)
    parser.add_argument("--stores", type=names, default=["pinned", "disk"])
    parser.add_argument("--tolerance-nats", type=float, default=0.02, help="of steps that fit")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    register()
    if not torch.cuda.is_available():  # vLLM by itself has no INT4 experts there
        from evalsuite.engines.vllm_plugin import cpu_int4

        cpu_int4.install()
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HLWQ_EVAL_CACHE"] = str(Path(scratch) / "experts")
        for kind in arguments.kinds:
            folder = write_tiny_moe(
                Path(scratch) / kind, int4=kind == "int4", experts=EXPERTS, top_k=TOP_K, hidden=256,
                intermediate=128, layers=3, vocabulary=VOCABULARY, group=128,
            )  # fmt: skip
            for row in check(kind, folder, arguments):
                row["faulty"] = faulty(row, arguments.tolerance_nats)
                print(json.dumps(row), flush=True)
                rows.append(row)
                if arguments.out:  # now: a later engine may fail
                    arguments.out.write_text(json.dumps(summary(rows, began), indent=1))
    result = summary(rows, began)
    print(f"{len(rows)} rows, {result['faults']} faults, {result['seconds']:.0f} s, {result['device']}")
    sys.exit(1 if result["faults"] else 0)


if __name__ == "__main__":
    main()
