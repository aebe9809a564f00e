"""Scoring speed and memory, side by side with the sliding-window loop of the Hugging Face documentation.

    python experiments/benchmarks/scoring.py --model smollm2 --limit 16 --out FILE.json

The reference (https://huggingface.co/docs/transformers/perplexity) runs one window at a time, lets the model
compute the logits of every position, and takes the loss over the labels that are not masked. Both arms score
the same windows with the same weights and the same type in one process, after a warm-up each. Printed are
ratios, the difference in ln PPL, and the share of the matrix rate that this machine reaches:

    operations = 2 · matrix weights · tokens through the model          projections
               + 2 · layers · heads · head size · Σ window²             attention, causal half of 4·T²·d
               + 2 · vocabulary · hidden · scored tokens                head, scored positions only

A second part measures the head alone at a vocabulary of 248,320: peak memory of a scored window less that of
the decoder's pass.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from evalsuite.core.protocol import PROTOCOLS
from evalsuite.data.corpora import load_corpus
from evalsuite.data.models import find_checkpoint
from evalsuite.data.tokens import tokenise
from evalsuite.data.windows import TokenWindow, cut, plan_windows
from evalsuite.engines.head import Head, nats_of
from evalsuite.engines.tokenizer import load_tokenizer
from evalsuite.engines.torch import TorchScorer
from evalsuite.telemetry.machine import read_machine

LARGE_VOCABULARY = 248_320


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def reference_loop(model: Any, windows: list[TokenWindow], device: torch.device) -> tuple[float, float]:
    """Σ nats and seconds of the documented loop."""
    total = 0.0
    began = time.perf_counter()
    for window in windows:
        ids = torch.from_numpy(window.ids)[None].to(device)
        labels = ids.clone()
        labels[:, : window.offset] = -100
        total += float(model(ids, labels=labels).loss) * window.scored
    return total, time.perf_counter() - began


@torch.inference_mode()
def reference_in_float32(model: Any, windows: list[TokenWindow], device: torch.device) -> float:
    """Σ nats of the same forward passes with every logit in float32: what the documented loop rounds away."""
    weight = model.get_output_embeddings().weight.float()
    total = 0.0
    for window in windows:
        ids = torch.from_numpy(window.ids)[None].to(device)
        hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state[0, window.offset - 1 : -1]
        logits = hidden.float() @ weight.T
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, window.offset :], reduction="sum"))
    return total


def suite(scorer: TorchScorer, windows: list[TokenWindow], device: torch.device) -> tuple[float, float, int]:
    """Σ nats, seconds and batch size of the suite's scorer."""
    batch = scorer.largest_batch(windows[0])
    scorer.score(windows[:batch])
    synchronize(device)
    total = 0.0
    began = time.perf_counter()
    for start in range(0, len(windows), batch):
        total += math.fsum(float(s.nats.sum()) for s in scorer.score(windows[start : start + batch]))
    return total, time.perf_counter() - began, batch


def operations(model: Any, windows: list[TokenWindow]) -> float | None:
    """As defined above; None for a mixture of experts, whose matrices are not all used."""
    config = model.config.get_text_config()
    if hasattr(config, "num_experts"):
        return None
    head = model.get_output_embeddings()
    matrices = sum(
        m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head
    )
    width = config.num_attention_heads * config.head_dim
    tokens = sum(len(w.ids) for w in windows)
    squares = sum(len(w.ids) ** 2 for w in windows)
    return (
        2.0 * matrices * tokens
        + 2.0 * config.num_hidden_layers * width * squares
        + 2.0 * head.weight.numel() * sum(w.scored for w in windows)
    )


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large square product, the best of five."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(6):
        synchronize(device)
        began = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


@torch.inference_mode()
def head_memory(device: torch.device) -> dict[str, float] | None:
    """Extra bytes of scoring one window of 1,536 at a large vocabulary; None where torch does not count."""
    if device.type != "cuda":
        return None
    config = LlamaConfig(
        vocab_size=LARGE_VOCABULARY, hidden_size=1024, intermediate_size=2048, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).to(device, torch.bfloat16)
    ids = torch.randint(0, LARGE_VOCABULARY, (1, 1536), device=device)
    head = Head(model.get_output_embeddings().weight)

    def peak(work: Any) -> int:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)

    def scored() -> None:
        hidden = model.model(ids, use_cache=False).last_hidden_state[0, -257:-1]
        nats_of(hidden, ids[0, -256:], head)

    scored()
    decoder = peak(lambda: model.model(ids, use_cache=False))
    return {
        "decoder_peak_bytes": decoder,
        "scored_peak_bytes": peak(scored),
        "full_logits_peak_bytes": peak(lambda: model(ids, use_cache=False).logits.float()),
    }


def compare(
    model: str, corpus: str, limit: int | None, device: str, dtype: str, against: str
) -> dict[str, Any]:
    """Both arms on the same windows; `against` is the type of the reference."""
    checkpoint = find_checkpoint(model)
    tokenizer = load_tokenizer(None, checkpoint)
    protocol = PROTOCOLS["card-1155"]
    stream = tokenise(tokenizer.tokenizer, load_corpus(corpus).text(protocol.join), protocol.bos)
    windows = list(cut(stream, plan_windows(len(stream), protocol, limit)))
    scorer = TorchScorer(checkpoint, device=device, dtype=dtype)
    place = torch.device(scorer.facts.device)
    total, seconds, batch = suite(scorer, windows, place)
    reference = scorer if against == dtype else TorchScorer(checkpoint, device=device, dtype=against)
    reference_loop(reference._model, windows[:3], place)
    reference_total, reference_seconds = reference_loop(reference._model, windows, place)
    exact = reference_in_float32(reference._model, windows, place)
    scored = sum(w.scored for w in windows)
    rate = matrix_rate(place, getattr(torch, dtype))
    work = operations(scorer._model, windows)
    return {
        "model": model,
        "windows": len(windows),
        "scored_tokens": scored,
        "dtype": dtype,
        "reference_dtype": against,
        "batch_size": batch,
        "reference_s": reference_seconds,
        "suite_s": seconds,
        "speedup": reference_seconds / seconds,
        "delta_ln_ppl": (total - reference_total) / scored,
        "delta_ln_ppl_float32_logits": (total - exact) / scored,
        "matrix_rate_ops_per_s": rate,
        "suite_share_of_matrix_rate": work and work / seconds / rate,
        "reference_share_of_matrix_rate": work and work / reference_seconds / rate,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--corpus", default="wikitext-2")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--types", nargs="+", default=["float32", "bfloat16:float32"], help="suite type[:reference type]"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for pair in args.types:
        dtype, _, against = pair.partition(":")
        rows.append(compare(args.model, args.corpus, args.limit, args.device, dtype, against or dtype))
        print(json.dumps(rows[-1], indent=1), flush=True)
        save(args.out, rows, None)
    memory = head_memory(torch.device(args.device))
    print(json.dumps(memory))
    save(args.out, rows, memory)


def save(out: Path | None, rows: list[dict[str, Any]], memory: dict[str, float] | None) -> None:
    """After every row, so that a benchmark that is cut short keeps what it has."""
    if out is None:
        return
    document = {
        "benchmark": "scoring",
        "machine": read_machine().model_dump(),
        "rows": rows,
        "head_memory": memory,
    }
    out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
