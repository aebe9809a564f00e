"""Scoring through vLLM: the suite's path, side by side with one window at a time under ``prompt_logprobs=0``.

    python experiments/benchmarks/vllm_scoring.py --model demo --windows 40 --reference-windows 8
    python experiments/benchmarks/vllm_scoring.py --model experiments/geometry/qwen3.5-35b-a3b-int4 --dummy \\
        --windows 86 --reference-windows 12 --out FILE.json

The reference is what vLLM offers for the job: a request with ``prompt_logprobs=0``, which returns the
log-probability of every token of the prompt. It runs on the same engine as the suite's path, or with
``--reference-engine stock`` on one with vLLM's defaults (compiled, CUDA graphs), started after the first is
closed. Both score windows of card-1155, of the same model in the same type, after a warm-up. Printed are
the ratio of the times of a window, the time that all 1,155 windows take at this rate, the difference of the
nats, and the share of the matrix rate that this machine reaches in a large square product:

    operations = 2 · active weights · tokens                       projections, top-k of the experts
               + 2 · layers · heads · head size · Σ window²        full attention, causal half of 4·T²·d
               + 6 · layers · heads · key · value · tokens         linear attention, its recurrent form
               + 2 · vocabulary · hidden · scored tokens           head, scored positions only

Both arms are counted with this work, since what the reference computes beyond it is what it wastes. Dummy
weights (``--dummy``) take a config.json alone: their time is this geometry's, if their routing is a model's;
VLLM_MOE_ROUTING_SIMULATION_STRATEGY=uniform_random makes it uniform. Their nats are no measurement.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scoring import matrix_rate

from evalsuite.core.protocol import PROTOCOLS
from evalsuite.core.spec import Serving
from evalsuite.data.models import Checkpoint, find_checkpoint
from evalsuite.data.windows import TokenWindow
from evalsuite.engines.vllm_arguments import engine_arguments, text_config
from evalsuite.engines.vllm_scorer import VllmScorer
from evalsuite.telemetry.machine import read_machine

PROTOCOL = PROTOCOLS["card-1155"]
ALL_WINDOWS = 1155
WARM_UP = 2  # reference windows
ROUTING = "VLLM_MOE_ROUTING_SIMULATION_STRATEGY"


def windows_of(checkpoint: Checkpoint, corpus: str, count: int) -> list[TokenWindow]:
    """Windows of real text; of random tokens where the checkpoint has no tokenizer, which changes no time."""
    if (checkpoint.folder / "tokenizer.json").is_file():
        from evalsuite.data.corpora import load_corpus
        from evalsuite.data.tokens import tokenise
        from evalsuite.data.windows import cut, plan_windows
        from evalsuite.engines.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(None, checkpoint).tokenizer
        stream = tokenise(tokenizer, load_corpus(corpus).text(PROTOCOL.join), PROTOCOL.bos)
        return list(cut(stream, plan_windows(len(stream), PROTOCOL, count)))
    vocabulary = text_config(checkpoint.config())["vocab_size"]
    ids = np.random.default_rng(0).integers(0, vocabulary, PROTOCOL.context + count * PROTOCOL.stride)
    starts = (number * PROTOCOL.stride for number in range(count))
    return [
        TokenWindow(number, ids[start : start + PROTOCOL.context], PROTOCOL.context - PROTOCOL.stride)
        for number, start in enumerate(starts)
    ]


def suite(scorer: VllmScorer, windows: list[TokenWindow]) -> tuple[list[np.ndarray], list[float], int]:
    """Nats of each window, seconds of each batch, and windows a batch."""
    batch = scorer.largest_batch(windows[0])
    scorer.score(windows[:batch])
    nats: list[np.ndarray] = []
    seconds: list[float] = []
    for start in range(0, len(windows), batch):
        began = time.perf_counter()
        nats += [score.nats for score in scorer.score(windows[start : start + batch])]
        seconds.append(time.perf_counter() - began)
    return nats, seconds, batch


def reference(llm: Any, windows: list[TokenWindow]) -> tuple[list[np.ndarray], list[float]]:
    """Nats of each window, and seconds of each, one request at a time."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    nats: list[np.ndarray] = []
    seconds: list[float] = []
    for window in [*windows[:WARM_UP], *windows]:
        ids = window.ids.tolist()
        began = time.perf_counter()
        (answer,) = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        scored = range(window.offset, len(ids))
        nats.append(np.array([-answer.prompt_logprobs[place][ids[place]].logprob for place in scored]))
        seconds.append(time.perf_counter() - began)
    return nats[WARM_UP:], seconds[WARM_UP:]


def operations(checkpoint: Checkpoint, window: TokenWindow) -> float:
    """Of one window, as defined above."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config: Any = AutoConfig.from_pretrained(str(checkpoint.folder)).get_text_config()
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings().weight
    apart = {id(head), id(model.get_input_embeddings().weight)}
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
    share = getattr(config, "num_experts_per_tok", 1) / experts
    weights = sum(
        parameter.numel() * (share if ".experts." in name else 1)
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and id(parameter) not in apart
    )
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    linear = kinds.count("linear_attention")
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    tokens = len(window.ids) - 1
    state = (
        config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
        if linear
        else 0
    )
    return (
        2.0 * weights * tokens
        + 2.0 * (len(kinds) - linear) * width * tokens**2
        + 6.0 * linear * state * tokens
        + 2.0 * head.numel() * window.scored
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Both arms and the matrix rate, in this process."""
    checkpoint = find_checkpoint(args.model, weights=not args.dummy)
    windows = windows_of(checkpoint, args.corpus, args.windows)
    few = windows[: args.reference_windows]
    serving = Serving(
        engine="vllm",
        dtype=args.dtype,
        enforce_eager=not args.graphs,
        load_format="dummy" if args.dummy else "auto",
        additional_config=json.loads(args.additional_config),
        gpu_memory_utilization=args.gpu_memory_utilization,
    )
    longest = PROTOCOL.context + 1  # the reference asks for one token more than a window has
    scorer = VllmScorer(checkpoint, serving, context=longest, step_tokens=args.step_tokens)
    nats, batches, batch = suite(scorer, windows)
    if args.reference_engine == "same":
        expected, singles = reference(scorer._llm, few)
    facts, load_s = scorer.facts, scorer.load_s
    scorer.close()
    if args.reference_engine == "stock":
        from vllm import LLM

        stock = serving.model_copy(update={"enforce_eager": False, "max_model_len": longest})
        expected, singles = reference(LLM(**engine_arguments(checkpoint, stock)), few)
    place = torch.device(facts.device)
    rate, work = matrix_rate(place, getattr(torch, facts.dtype)), operations(checkpoint, windows[0])
    window_s, reference_s = math.fsum(batches) / len(windows), math.fsum(singles) / len(few)
    gaps = np.concatenate(nats[: len(few)]) - np.concatenate(expected)
    return {
        "model": checkpoint.name,
        "stored": facts.stored,
        "routing": os.environ.get(ROUTING, "by the weights"),
        "device": facts.device_name,
        "dtype": facts.dtype,
        "engaged": facts.engaged,
        "load_s": load_s,
        "windows": len(windows),
        "batch_size": batch,
        "batch_s": batches,
        "window_s": window_s,
        "windows_per_s": 1 / window_s,
        "all_windows_s": ALL_WINDOWS * window_s,
        "reference_engine": args.reference_engine,
        "reference_windows": len(few),
        "reference_each_s": singles,
        "reference_window_s": reference_s,
        "reference_all_windows_s": ALL_WINDOWS * reference_s,
        "speedup": reference_s / window_s,
        "mean_nats_difference": float(gaps.mean()),
        "largest_nats_difference": float(np.abs(gaps).max()),
        "window_operations": work,
        "matrix_rate_ops_per_s": rate,
        "share_of_matrix_rate": work / window_s / rate,
        "reference_share_of_matrix_rate": work / reference_s / rate,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--corpus", default="builtin")
    parser.add_argument("--dummy", action="store_true", help="random weights; config.json is enough")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--windows", type=int, default=86)
    parser.add_argument("--reference-windows", type=int, default=12)
    parser.add_argument("--reference-engine", choices=["same", "stock"], default="same")
    parser.add_argument("--step-tokens", type=int, help="tokens a forward pass of the suite's engine")
    parser.add_argument("--graphs", action="store_true", help="compile the suite's engine too")
    parser.add_argument("--gpu-memory-utilization", type=float)
    parser.add_argument("--additional-config", default="{}", help="JSON, handed to vLLM")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    row = measure(args)
    print(json.dumps(row, indent=1))
    if args.out is not None:
        document = {"benchmark": "vllm_scoring", "machine": read_machine().model_dump(), "rows": [row]}
        args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
