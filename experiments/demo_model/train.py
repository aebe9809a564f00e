"""Trains the built-in model: a small Qwen3.5-MoE that reads bytes.

One loop, no framework. AdamW works on float32 master weights; the forward and backward passes run
on a bfloat16 copy of them, which is what the saved model will be. (Autocast would not do: grouped
matrix products are not among the operations it casts.) A window is 1,537 tokens cut anywhere out
of the stream of documents, so that 1,536 are predicted, the context the model is evaluated at.

Each layer adds `load_balancing_loss_func` with a small coefficient: no expert dies, and yet the
router stays free to prefer some, as a cache of experts needs to find.

The schedule follows the wall clock (--minutes) or the step count (--steps), whichever is further
on: linear warm-up, then a cosine down to nothing. Same seed and --steps: the same run up to the
order of floating-point sums; with --minutes the number of steps depends on the machine.

    python train.py CORPUS.xz OUT --minutes 6
"""

import argparse
import hashlib
import json
import lzma
import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.nn import functional as F
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import load_balancing_loss_func

SEED = 1155
CONTEXT = 1536
END = 256  # the token between documents
PEAK_RATE, WARM_UP_STEPS, DECAY, CLIP = 3e-3, 200, 0.1, 1.0
BALANCE = 0.003  # weight of the load-balancing loss, per layer

CONFIG = Qwen3_5MoeTextConfig(
    vocab_size=257,
    hidden_size=128,
    num_hidden_layers=2,
    layer_types=["linear_attention", "full_attention"],
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=32,
    linear_value_head_dim=32,
    moe_intermediate_size=128,
    shared_expert_intermediate_size=128,
    num_experts=128,
    num_experts_per_tok=8,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=END,
    router_aux_loss_coef=BALANCE,
    initializer_range=0.06,  # about 0.7 / sqrt(hidden_size): a small model wants larger steps from the start
)


def load_stream(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) tokens; a document is held out by its own hash, one in a hundred."""
    streams: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for document in lzma.decompress(path.read_bytes()).split(b"\0"):
        held_out = int.from_bytes(hashlib.sha256(document).digest()[:8]) % 100 == 0
        streams[held_out].append(np.frombuffer(document + b"\0", np.uint8).astype(np.int16))
        streams[held_out][-1][-1] = END
    training, validation = (np.concatenate(stream) for stream in streams)
    return training, validation


def unigram_bits(stream: np.ndarray) -> float:
    """Entropy of the byte frequencies of this very text: the best a model without context can do."""
    share = np.bincount(stream[stream != END], minlength=256) / np.count_nonzero(stream != END)
    return float(-(share[share > 0] * np.log2(share[share > 0])).sum())


class Trainee:
    """The bfloat16 model that computes, and the float32 weights that learn."""

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(SEED)
        model = Qwen3_5MoeForCausalLM._from_config(
            CONFIG, experts_implementation="grouped_mm", attn_implementation="sdpa"
        ).to(device)
        self.device = device
        self.masters = [p.detach().float().clone().requires_grad_() for p in model.parameters()]
        self.model = model.to(torch.bfloat16)
        self.copies = list(self.model.parameters())
        groups = [
            {"params": [m for m in self.masters if m.ndim >= 2], "weight_decay": DECAY},
            {"params": [m for m in self.masters if m.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=device.type == "cuda"
        )
        self.balance = torch.zeros((), device=device)

    def loss(self, windows: torch.Tensor) -> torch.Tensor:
        """Mean nats per token of the windows; the balance term is left in `self.balance`."""
        out = self.model(windows[:, :-1], output_router_logits=True, use_cache=False)
        # Layer by layer: the pooled loss would let an expert dead in one layer hide behind the other.
        self.balance = sum(
            load_balancing_loss_func((logits,), CONFIG.num_experts, CONFIG.num_experts_per_tok)
            for logits in out.router_logits
        )
        return F.cross_entropy(out.logits.flatten(0, 1).float(), windows[:, 1:].flatten())

    def step(self, windows: torch.Tensor, rate: float) -> torch.Tensor:
        nats = self.loss(windows)
        (nats + BALANCE * self.balance).backward()
        for master, copy in zip(self.masters, self.copies, strict=True):
            master.grad = copy.grad.float()
            copy.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.copies, self.masters)
        return nats.detach()

    @torch.inference_mode()
    def validate(self, stream: torch.Tensor, batch: int) -> tuple[float, list[list[float]]]:
        """(bits per byte, share of the assignments that each expert gets, layer by layer)."""
        nats = scored = 0.0
        used = torch.zeros(CONFIG.num_hidden_layers, CONFIG.num_experts, device=self.device)
        for windows in stream.unfold(0, CONTEXT + 1, CONTEXT).split(batch):
            tokens = windows.to(self.device, torch.long)
            out = self.model(tokens[:, :-1], output_router_logits=True, use_cache=False)
            targets = tokens[:, 1:].flatten().masked_fill(tokens[:, 1:].flatten() == END, -100)
            nats += F.cross_entropy(out.logits.flatten(0, 1).float(), targets, reduction="sum").item()
            scored += (targets >= 0).sum().item()
            for layer, logits in enumerate(out.router_logits):
                chosen = logits.float().topk(CONFIG.num_experts_per_tok).indices.flatten()
                used[layer] += torch.bincount(chosen, minlength=CONFIG.num_experts)
        return nats / scored / math.log(2), (used / used.sum(1, keepdim=True)).tolist()


class Sampler:
    """Windows cut anywhere out of the training stream."""

    def __init__(self, stream: np.ndarray, device: torch.device) -> None:
        self.stream = torch.from_numpy(stream).to(device)
        self.offsets = torch.arange(CONTEXT + 1, device=device)
        self.random = torch.Generator(device).manual_seed(SEED)

    def draw(self, batch: int) -> torch.Tensor:
        last = len(self.stream) - len(self.offsets)
        starts = torch.randint(last, (batch, 1), generator=self.random, device=self.stream.device)
        return self.stream[starts + self.offsets].long()


def choose_batch(trainee: Trainee, sampler: Sampler, candidates: list[int], log) -> int:
    """The smallest batch within 15 % of the best rate: more steps out of the same minutes.

    Timed at a learning rate of zero, so the weights stay; the optimizer's moments start warm.
    """
    rates = {}
    for batch in candidates:
        for repeat in range(8):
            if repeat == 3:
                trainee_sync(trainee)
                begun = time.perf_counter()
            trainee.step(sampler.draw(batch), rate=0.0)
        trainee_sync(trainee)
        rates[batch] = 5 * batch * CONTEXT / (time.perf_counter() - begun)
        log(f"timing: batch {batch}: {rates[batch]:,.0f} tokens/s")
    return min(batch for batch, rate in rates.items() if rate >= 0.85 * max(rates.values()))


def trainee_sync(trainee: Trainee) -> None:
    if trainee.device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--steps", type=float, default=math.inf)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 48, 64, 96], help="sizes to time")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--validate-every", type=int, default=1000)
    args = parser.parse_args()
    if math.isinf(args.minutes) and math.isinf(args.steps):
        parser.error("say when to stop: --minutes or --steps")
    args.out.mkdir(parents=True, exist_ok=True)
    log_file = (args.out / "train.log").open("w", buffering=1)

    def log(line: str) -> None:
        print(line, flush=True)
        print(line, file=log_file)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    training, validation = load_stream(args.corpus)
    trainee, sampler = Trainee(device), Sampler(training, device)
    held_out = torch.from_numpy(validation)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    parameters = sum(m.numel() for m in trainee.masters)
    log(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, seed {SEED}")
    log(f"{parameters:,} parameters; {len(training):,} training and {len(validation):,} validation tokens")
    log(f"validation unigram entropy {unigram_bits(validation):.4f} bits/byte")
    batch = args.batches[0] if len(args.batches) == 1 else choose_batch(trainee, sampler, args.batches, log)
    log(f"batch {batch} x {CONTEXT}, peak rate {PEAK_RATE}, balance {BALANCE}")

    begun = lap = time.perf_counter()
    step, recent, balance = 0, torch.zeros((), device=device), 0.0
    while (done := max((time.perf_counter() - begun) / 60 / args.minutes, step / args.steps)) < 1:
        rate = PEAK_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * (1 + math.cos(math.pi * done)) / 2
        recent += trainee.step(sampler.draw(batch), rate)
        step += 1
        if step % args.log_every == 0:
            bits = recent.item() / args.log_every / math.log(2)
            if not math.isfinite(bits):
                raise SystemExit(f"loss is {bits} at step {step}: lower PEAK_RATE")
            balance = trainee.balance.item()
            now = time.perf_counter()
            speed = args.log_every * batch * CONTEXT / (now - lap)
            line = f"step {step} tokens {step * batch * CONTEXT} train {bits:.4f} bits/byte"
            if step % args.validate_every == 0:
                line += f" validation {trainee.validate(held_out, 32)[0]:.4f} bits/byte"
            log(f"{line} balance {balance:.2f} rate {rate:.2e} {speed:,.0f} tokens/s {now - begun:.0f} s")
            recent.zero_()
            lap = time.perf_counter()
    trainee_sync(trainee)
    seconds = time.perf_counter() - begun

    bits, shares = trainee.validate(held_out, 32)
    trainee.model.save_pretrained(args.out)
    weights = (args.out / "model.safetensors").read_bytes()
    summary = {
        "device": name,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "seed": SEED,
        "parameters": parameters,
        "batch": batch,
        "steps": step,
        "tokens": step * batch * CONTEXT,
        "seconds": round(seconds, 1),
        "validation_bits_per_byte": round(bits, 4),
        "validation_unigram_bits_per_byte": round(unigram_bits(validation), 4),
        "validation_tokens": Counter(end=int((validation == END).sum()), byte=int((validation != END).sum())),
        "expert_share": [{"min": min(layer), "max": max(layer)} for layer in shares],
        "weights_bytes": len(weights),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    (args.out / "train.json").write_text(json.dumps(summary, indent=2) + "\n")
    log(json.dumps(summary))


if __name__ == "__main__":
    main()
