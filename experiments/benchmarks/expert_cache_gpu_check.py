"""Is the expert cache right on this GPU? Tiny random models, with the cache against without, in two minutes.

    python experiments/benchmarks/expert_cache_gpu_check.py --out FILE.json [--kinds int4,bf16] \\
        [--modes eager,graphs] [--policies lru,lfru] [--sizes 1,8,64,128] [--stores pinned,disk]

Runs anywhere that vLLM runs, installed or beside the repository on PYTHONPATH; everything is in one process
(VLLM_ENABLE_V1_MULTIPROCESSING=0), so that a call registers the plugin. For INT4 (Marlin) and BF16 experts,
eager and with CUDA graphs, at every cache size and with a slot for all but one: greedy tokens and prompt
log-probabilities against no cache, and counters against the policies replayed over the routing of the same
steps, which graphs leave behind too. One engine goes through all sizes; graphs are captured again for each.

A step that fits computes what it would without a cache, so its differences should be 0. A step that needs
several groups rounds what each adds to bfloat16, and where two experts of these random routers are almost
tied a token then goes elsewhere, so that answers say little of it. Hence every layer is also given made-up
tokens by itself: what it makes of 1, 8 and 90 of them in groups may differ from what it makes with a slot for
all experts but one by a unit in the last place, and by the rounding of what each group adds. In bfloat16,
with 8 significant bits, that is in every element

    |grouped − whole| ≤ 3 · 2⁻⁸ · Σ |share of an expert|

`layer_error` is the largest part of this bound that was reached, and `wrong_expert_error` what leaving out
one expert reaches at least.
"""

import argparse
import gc
import json
import math
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
from evalsuite.telemetry.machine import read_machine  # noqa: E402

EXPERTS, TOP_K, VOCABULARY = 256, 8, 512
SIZES = [1, TOP_K, 64, 128]
STEP_TOKENS, HIDDEN = 256, 256
LAYER_TOKENS = (1, 8, 90)
PROMPTS = [[(7 * i + 3 * j * j) % VOCABULARY for i in range(n)] for j, n in enumerate((1, 2, 5, 24, 90))]


def start(folder: Path, graphs: bool, **cache: Any) -> LLM:
    on_gpu = torch.cuda.is_available()
    return LLM(
        model=str(folder), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=256, max_num_seqs=8,
        max_num_batched_tokens=STEP_TOKENS, enforce_eager=not graphs, enable_prefix_caching=False, seed=0,
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


class Recorder:
    """The routed experts of every step of every layer, eager or in graphs that are captured after it is made.

    Layers leave them in memory that a captured graph writes to as well; the worker reads it after each step.
    """

    def __init__(self, llm: LLM) -> None:
        self.traces: list[list[torch.Tensor]] = []
        self._left: list[torch.Tensor] = []
        for method in methods(llm):
            left = torch.full((STEP_TOKENS, TOP_K), -1, device=next(iter(method.cache.slots.values())).device)
            apply = method.apply

            def leaving(_apply: Any = apply, _left: torch.Tensor = left, **arguments: Any) -> Any:
                ids = arguments["topk_ids"]
                _left[: len(ids)].copy_(ids)
                return _apply(**arguments)

            method.apply = leaving
            self._left.append(left)
            self.traces.append([])
        llm.collective_rpc(self._watch)

    def _watch(self, worker: Any) -> None:
        inner = getattr(worker, "worker", worker)
        execute = inner.execute_model

        def executed(scheduler_output: Any) -> Any:
            output = execute(scheduler_output)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if tokens := scheduler_output.total_num_scheduled_tokens:
                for left, trace in zip(self._left, self.traces, strict=True):
                    trace.append(left[:tokens].to("cpu", copy=True))
            return output

        inner.execute_model = executed

    def clear(self) -> None:
        for trace in self.traces:
            trace.clear()


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


class Layers:
    """Every layer by itself, on made-up tokens.

    The first call, with a slot for all experts but one, makes what later ones are held against.
    """

    def __init__(self) -> None:
        self._expected: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self.wrong_expert_error = math.inf

    def error(self, llm: LLM) -> float:
        """The largest difference, as a share of the bound."""
        found: list[float] = []
        llm.collective_rpc(lambda worker: found.append(self._error(getattr(worker, "worker", worker))))
        return found[0]

    @torch.inference_mode()
    def _error(self, worker: Any) -> float:
        from vllm.forward_context import set_forward_context

        modules = worker.model_runner.get_model().modules()
        layers = [m for m in modules if isinstance(getattr(m, "quant_method", None), CachedExperts)]
        worst = 0.0
        for number, layer in enumerate(layers):
            for tokens in LAYER_TOKENS:
                x, weights, ids = made_up(tokens, number, worker.device)
                if worker.device.type == "cuda":
                    layer.quant_method.cache.token_limit.fill_(tokens)

                def computed(weights: torch.Tensor, layer: Any = layer, x: Any = x, ids: Any = ids) -> Any:
                    with set_forward_context(None, worker.vllm_config, num_tokens=len(x)):
                        return layer.quant_method.apply(
                            layer=layer, x=x, topk_weights=weights, topk_ids=ids,
                            shared_experts=None, shared_experts_input=None,
                        ).double()  # fmt: skip

                whole = computed(weights)
                if (number, tokens) not in self._expected:
                    shares = [computed(weights * mask) for mask in torch.eye(TOP_K, device=x.device)]
                    bound = 3 * 2**-8 * torch.stack(shares).abs().sum(0)
                    self._expected[number, tokens] = whole, bound
                    left_out = [(share.abs() / bound).max(-1).values.min() for share in shares]
                    self.wrong_expert_error = min(self.wrong_expert_error, float(min(left_out)))
                expected, bound = self._expected[number, tokens]
                error = float(((whole - expected).abs() / bound).max())
                worst = max(worst, error if error == error else math.inf)  # a NaN is no number to compare
        return worst


def made_up(tokens: int, seed: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, and the weights and ids of each token's experts."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(torch.bfloat16)
    scores, ids = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K)
    return x.to(device), (scores / scores.sum(-1, keepdim=True)).to(device), ids.to(device, torch.int32)


def check(kind: str, folder: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every row of one kind of experts."""
    for mode in arguments.modes:
        alone, together = yield from baseline(kind, mode, folder)
        layers = Layers()
        for llm, recorder, row in cached(kind, folder, mode, arguments):
            policy, size = row["policy"], row["size"]
            mine, mine_together = answers(llm, together=False), answers(llm, together=True)
            counts = counted(llm)
            row["counters_right"] = counts == counted_by_rule(recorder.traces, size, policy)
            row["hit_rate"] = sum(c[1] for c in counts) / sum(c[1] + c[2] for c in counts)
            row |= {"layer_error": layers.error(llm), "wrong_expert_error": layers.wrong_expert_error}
            yield compare(row | {"what": "alone"}, mine, alone, size)
            yield compare(row | {"what": "together"}, mine_together, together)


def cached(
    kind: str, folder: Path, mode: str, arguments: argparse.Namespace
) -> Iterator[tuple[LLM, Recorder, dict[str, Any]]]:
    """One engine for each store and policy, at one size after the other, and the beginning of its row."""
    for store in arguments.stores:
        for policy in arguments.policies if store == "pinned" else arguments.policies[:1]:
            sizes = [EXPERTS - 1, *(size for size in arguments.sizes if size < EXPERTS - 1)]
            llm = start(folder, mode == "graphs", cache_size=sizes[-1], cache_policy=policy, store=store)
            recorder = Recorder(llm)
            for size in sizes:
                client.resize(llm, size)
                recorder.clear()
                yield (
                    llm,
                    recorder,
                    {"kind": kind, "mode": mode, "policy": policy, "store": store, "size": size},
                )
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
    differs = row.get("fitting_max_nats", 0) > tolerance_nats or row.get("fitting_changed", 0) > 0
    wrong_layer = row.get("layer_error", 0) > 1 or row.get("wrong_expert_error", math.inf) < 2
    return not row.get("counters_right", True) or wrong_layer or differs or row["mean_nats"] > 0.2


def summary(rows: list[dict[str, Any]], began: float) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "machine": read_machine().model_dump(mode="json"),
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
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--modes", type=names, default=["eager", "graphs"] if on_gpu else ["eager"])
    parser.add_argument("--policies", type=names, default=["lru", "lfru"])
    parser.add_argument("--sizes", type=lambda text: [int(size) for size in text.split(",")], default=SIZES)
    parser.add_argument("--stores", type=names, default=["pinned", "disk"])
    parser.add_argument("--tolerance-nats", type=float, default=0.02, help="of steps that fit")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if "graphs" in arguments.modes and not on_gpu:
        parser.error("--modes: graphs take a GPU")
    register()
    if not on_gpu:  # vLLM by itself has no INT4 experts there
        from evalsuite.engines.vllm_plugin import cpu_int4

        cpu_int4.install()
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HLWQ_EVAL_CACHE"] = str(Path(scratch) / "experts")
        for kind in arguments.kinds:
            folder = write_tiny_moe(
                Path(scratch) / kind, int4=kind == "int4", experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN,
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
