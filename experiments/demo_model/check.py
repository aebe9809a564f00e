"""Is the built-in model worth shipping? On the CPU, on the text it is evaluated on, in bfloat16.

- bits per byte of `pydoc_data.topics` (never trained on: see corpus.py), against the entropy of
  that text's byte frequencies, the best that a model without context can reach;
- how often each expert is called, and how many of a token's experts its predecessor called too;
- what rounding the routed experts to INT4 costs (symmetric, a scale of max|w|/7 for each 128
  inputs): a model that does not feel it could not show that a quantised model differs.

The protocol is the product's: context 1536, stride 256, the last 256 tokens of each full window.
`--every N` takes each Nth window, to see the whole text for the price of a part.

    python experiments/demo_model/check.py evalsuite/demo --windows 60
"""

import argparse
import json
import math
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

CONTEXT, STRIDE, GROUP, BATCH = 1536, 256, 128, 4


def unigram_bits(ids: torch.Tensor) -> float:
    share = torch.bincount(ids).double() / len(ids)
    return -(share[share > 0] * share[share > 0].log2()).sum().item()


@torch.inference_mode()
def score(model, windows: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(nats per scored byte of each window; each layer's chosen experts: [window, position, choice])."""
    nats, chosen = [], [[] for _ in range(model.config.num_hidden_layers)]
    for batch in windows.split(BATCH):
        out = model(batch, output_router_logits=True, use_cache=False)
        logits = out.logits[:, -STRIDE - 1 : -1].transpose(1, 2).float()
        nats.append(F.cross_entropy(logits, batch[:, -STRIDE:], reduction="none").mean(1))
        for layer, routing in enumerate(out.router_logits):
            choice = routing.float().topk(model.config.num_experts_per_tok).indices
            chosen[layer].append(choice.view(*batch.shape, -1))
    return torch.cat(nats), [torch.cat(layer) for layer in chosen]


def expert_use(chosen: torch.Tensor, experts: int) -> dict[str, float]:
    share = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
    kept = (chosen[:, 1:, :, None] == chosen[:, :-1, None, :]).any(-1).float().mean()
    return {
        "experts_never_called": int((share == 0).sum()),
        "share_min": share.min().item(),
        "share_max": share.max().item(),
        "share_of_busiest_half": share.sort().values[experts // 2 :].sum().item(),
        "share_kept_from_previous_token": kept.item(),
    }


@torch.no_grad()
def round_experts_to_int4(model) -> None:
    for name, weight in model.named_parameters():
        if ".experts." in name:  # [expert, output, input]
            groups = weight.float().unflatten(-1, (-1, GROUP))
            scale = groups.abs().amax(-1, keepdim=True) / 7
            weight.copy_(((groups / scale).round() * scale).flatten(-2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--every", type=int, default=1, metavar="N")
    args = parser.parse_args()

    text = "\n\n".join(topics[name] for name in sorted(topics))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    if ids.tolist() != list(text.encode()):
        raise SystemExit("the tokenizer's ids are not the text's bytes")
    windows = ids.unfold(0, CONTEXT, STRIDE)[:: args.every][: args.windows]

    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16, experts_implementation="grouped_mm"
    ).eval()
    each, chosen = score(model, windows)
    round_experts_to_int4(model)
    each_rounded, _ = score(model, windows)
    nats, rounded, cost = each.mean().item(), each_rounded.mean().item(), each_rounded - each
    report = {
        "windows": len(windows),
        "every": args.every,
        "unigram_bits_per_byte": unigram_bits(ids),
        "bits_per_byte": nats / math.log(2),
        "perplexity": math.exp(nats),
        "int4_bits_per_byte": rounded / math.log(2),
        "int4_perplexity": math.exp(rounded),
        "int4_delta_ln_perplexity": rounded - nats,
        "int4_delta_standard_error": (cost.std() / len(cost) ** 0.5).item(),
        "experts": [expert_use(layer, model.config.num_experts) for layer in chosen],
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
