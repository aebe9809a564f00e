"""Runs tiny models through the real vLLM with and without the expert cache: cached.py OUT-FILE.

One process for all engines; OUT-FILE is JSON. Nothing is asserted here.
"""

import gc
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import vllm.engine.arg_utils  # noqa: F401 (what the plugin extends)
from vllm import LLM, EngineArgs, SamplingParams
from vllm_cpu.tiny_moe import write_tiny_moe

from evalsuite.core.errors import EvalError
from evalsuite.engines.vllm_plugin import cpu_int4, host_store, layers, register, spill, versions
from evalsuite.engines.vllm_plugin.layers import CachedExperts

EXPERTS, TOP_K = 16, 2
KINDS: dict[str, dict[str, Any]] = {
    "bf16": {"int4": False},
    "int4": {"int4": True},
    "shared": {"int4": False, "shared": True},
    "wide": {"int4": True, "experts": 160, "top_k": 8},
}
PROMPTS = [[(7 * i + 3 * j * j) % 257 for i in range(n)] for j, n in enumerate((1, 2, 4, 7, 40, 3, 9, 1))]
SETTINGS = [  # policy, size
    ("lru", 1), ("lru", TOP_K), ("lru", 8), ("lru", EXPERTS), ("lfu", 3), ("fifo", 3), ("slru", 5), ("lfru", 5),
]  # fmt: skip
WIDE_SETTINGS = [("lru", 1), ("lru", 8), ("lru", 64), ("lru", 128), ("lru", 160)]
ONE_AT_A_TIME, AT_ONCE = 1, 8


def geometry(kind: str) -> tuple[int, int]:
    """Experts of a layer, and of a token."""
    return KINDS[kind].get("experts", EXPERTS), KINDS[kind].get("top_k", TOP_K)


def settings(kind: str) -> list[tuple[str, int]]:
    return WIDE_SETTINGS if kind == "wide" else SETTINGS


def start(folder: Path, load_format: str = "auto", **additional: Any) -> LLM:
    return LLM(
        model=str(folder), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=64, max_num_seqs=8,
        enforce_eager=True, enable_prefix_caching=False, seed=0, additional_config=additional,
        load_format=load_format,
    )  # fmt: skip


def answers(llm: LLM, concurrency: int) -> list[dict[str, Any]]:
    """Greedy tokens of each prompt, and the log-probabilities of its own."""
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, prompt_logprobs=0, detokenize=False)
    found = []
    for start in range(0, len(PROMPTS), concurrency):
        batch = PROMPTS[start : start + concurrency]
        outputs = llm.generate([{"prompt_token_ids": p} for p in batch], params, use_tqdm=False)
        for prompt, output in zip(batch, outputs, strict=True):
            pairs = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
            nats = [entry[token].logprob for token, entry in pairs]
            found.append({"tokens": list(output.outputs[0].token_ids), "logprobs": nats})
    return found


def of_worker(llm: LLM, function: Any) -> Any:
    (result,) = llm.collective_rpc(function)
    return result


def methods(worker: Any) -> list[Any]:
    found = (getattr(module, "quant_method", None) for module in worker.model_runner.get_model().modules())
    return [method for method in found if isinstance(method, CachedExperts)]


def record(llm: LLM) -> list[list[list[int]]]:
    """From now on, the distinct experts of every step of every layer."""
    traces: list[list[list[int]]] = []
    for method in of_worker(llm, methods):
        trace: list[list[int]] = []
        method.__dict__.pop("apply", None)
        apply = method.apply

        def recorded(_apply: Any = apply, _trace: Any = trace, **arguments: Any) -> Any:
            _trace.append(arguments["topk_ids"].unique().tolist())
            return _apply(**arguments)

        method.apply = recorded
        traces.append(trace)
    return traces


def use_policy(llm: LLM, policy: str) -> None:
    for method in of_worker(llm, methods):
        method.cache.policy_name = policy


def facts(worker: Any) -> dict[str, Any]:
    """What the layers of an engine are made of."""
    layers = [
        m
        for m in worker.model_runner.get_model().modules()
        if hasattr(m, "quant_method") and hasattr(m, "top_k")
    ]
    return {
        "worker": type(worker.worker if hasattr(worker, "worker") else worker).__name__,
        "parameters": [[n, list(p.shape)] for layer in layers for n, p in layer.named_parameters()],
        "cached": [isinstance(layer.quant_method, CachedExperts) for layer in layers],
    }


def run(kind: str, folder: Path) -> dict[str, Any]:
    experts, top_k = geometry(kind)
    plain = start(folder)
    result: dict[str, Any] = {
        "plain": {str(c): answers(plain, c) for c in (ONE_AT_A_TIME, AT_ONCE)},
        "plain_facts": of_worker(plain, facts),
        "cached": [],
    }
    stop(plain)
    cached = start(folder, moe_expert_cache_size=top_k, moe_expert_cache_policy="lru")
    result["cached_facts"] = of_worker(cached, facts)
    result["fresh_counters"] = cached.collective_rpc("expert_cache_counters")[0]
    for policy, size in settings(kind):
        use_policy(cached, policy)
        cached.collective_rpc("resize_expert_cache", args=(size if size < experts else None,))
        traces = record(cached)
        found = {str(c): answers(cached, c) for c in (ONE_AT_A_TIME, AT_ONCE)}
        counters = cached.collective_rpc("expert_cache_counters")[0]
        cached.collective_rpc("reset_expert_cache_counters")
        result["cached"].append(
            {"policy": policy, "size": size, "answers": found, "counters": counters, "traces": traces}
            | {"after_reset": cached.collective_rpc("expert_cache_counters")[0]}
        )
    stop(cached)
    return result


def on_disk(folder: Path, experts: Path, size: int = TOP_K) -> dict[str, Any]:
    """The same with the experts in a file: written the first time, found the second."""
    with patch.dict(os.environ, {"HLWQ_EVAL_CACHE": str(experts)}):
        llm = start(folder, moe_expert_cache_size=size, moe_expert_store="disk")
    (method, *_) = of_worker(llm, methods)
    result = {
        "answers": answers(llm, ONE_AT_A_TIME),
        "counters": llm.collective_rpc("expert_cache_counters")[0],
        "written": method.cache.store.written,
    }
    stop(llm)
    return result


def random_weights(folder: Path) -> list[list[dict[str, Any]]]:
    """Answers of random weights, without a cache and with one."""
    found = []
    for additional in ({}, {"moe_expert_cache_size": EXPERTS - 1}):
        llm = start(folder, "dummy", **additional)
        found.append(answers(llm, ONE_AT_A_TIME))
        stop(llm)
    return found


def refusals(folder: Path, dense: Path) -> dict[str, str]:
    """What is said to each request that cannot be carried out, and the worker of one that can."""

    def ask(model: Path = folder, **arguments: Any) -> str:
        options = {"additional_config": {"moe_expert_cache_size": 4}} | arguments
        try:
            made = EngineArgs(model=str(model), skip_tokenizer_init=True, max_model_len=64, **options)
            return made.create_engine_config().parallel_config.worker_cls
        except EvalError as error:
            return str(error)

    found = {
        "cached": ask(),
        "more than there are": ask(additional_config={"moe_expert_cache_size": EXPERTS + 1}),
        "all there are": ask(additional_config={"moe_expert_cache_size": EXPERTS}),
        "expert parallelism": ask(enable_expert_parallel=True),
        "data parallelism": ask(data_parallel_size=2),
        "LoRA": ask(enable_lora=True),
        "offloading": ask(cpu_offload_gb=1),
        "speculation": ask(
            additional_config={"moe_expert_cache_size": 4, "moe_expert_store": "disk"},
            speculative_config={"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2},
        ),
        "worker": ask(worker_cls="vllm.v1.worker.cpu_worker.CPUWorker"),
        "dense": ask(model=dense),
        "misspelt": ask(additional_config={"moe_expert_cache_sizes": 4}),
        "policy": ask(additional_config={"moe_expert_cache_size": 4, "moe_expert_cache_policy": "mru"}),
    }
    with patch.dict(os.environ, {"VLLM_MARLIN_INPUT_DTYPE": "int8"}):
        found["activations"] = ask()
    with patch.object(versions, "version", lambda _: "0.31.0"):
        found["version"] = ask()
    with patch.object(host_store, "free_ram_bytes", lambda: host_store.SPARE_BYTES):
        try:
            start(folder, moe_expert_cache_size=4)
        except EvalError as error:
            found["memory"] = str(error)
    return found


def without_memory(folder: Path, experts: Path) -> dict[str, Any]:
    """With the experts in a file, and no memory to load them in; what is left of loading in the folder."""
    none_left = patch.object(host_store, "free_ram_bytes", lambda: host_store.SPARE_BYTES)
    spilling = patch.object(layers, "spill", wraps=spill.spill)
    with none_left, patch.object(spill, "SMALLEST_BYTES", 1), spilling as spied:
        found = on_disk(folder, experts)
    return found | {
        "layers_spilled": spied.call_count,
        "left": [path.name for path in experts.iterdir() if path.suffix != ".experts"],
    }


def dense_config(folder: Path) -> Path:
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "hidden_size": 64,
        "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 64, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def stop(llm: LLM) -> None:
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


def main(out: Path) -> None:
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {
            kind: write_tiny_moe(Path(scratch) / kind, **{"experts": EXPERTS, "top_k": TOP_K} | shape)
            for kind, shape in KINDS.items()
        }
        before = start(folders["bf16"])  # no plugin yet
        result["without_plugin"] = answers(before, AT_ONCE)
        stop(before)
        register()
        register()
        cpu_int4.install()
        for kind, folder in folders.items():
            result[kind] = run(kind, folder)
            files, (_, top_k) = Path(scratch) / "experts", geometry(kind)
            result[kind]["disk"] = [on_disk(folder, files, top_k) for _ in range(2)]
        result["without_memory"] = without_memory(folders["int4"], Path(scratch) / "others")
        result["random"] = random_weights(folders["bf16"])
        result["refusals"] = refusals(folders["bf16"], dense_config(Path(scratch) / "dense"))
    out.write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
