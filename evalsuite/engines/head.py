"""From final hidden states to log-probabilities, without ever holding the full logits.

A vocabulary of 248,320 and one window of 1,536 tokens make 1.5 GB of float32 logits. Only scored positions
matter, and of their logits only a log-sum-exp and one entry, so both are taken over chunks of positions and
of vocabulary, in float32, with the running maximum of Milakov and Gimelshein, https://arxiv.org/abs/1805.02867.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

CHUNK_BYTES = 64 << 20  # of float32 logits at a time
CHUNK_POSITIONS = 4096


@dataclass(frozen=True)
class Head:
    """The output projection: logits = cap(hidden · weightᵀ + bias).

    Attributes:
        weight: [vocabulary, hidden].
        bias: [vocabulary] or None.
        softcap: logits are squashed to ±softcap by tanh (Gemma 2, https://arxiv.org/abs/2408.00118), or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    def logits(self, hidden: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """float32 [positions, stop − start]; products are summed in float32 whatever the weights' type."""
        weight = self.weight[start:stop]
        if weight.dtype == torch.float32:
            out = hidden.float() @ weight.T
        elif weight.is_cuda:
            out = torch.mm(hidden.to(weight.dtype), weight.T, out_dtype=torch.float32)
        else:
            out = hidden.float() @ weight.float().T
        if self.bias is not None:
            out += self.bias[start:stop].float()
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        return out

    def chunks(self, positions: int) -> Iterator[tuple[int, int]]:
        """Ranges of the vocabulary whose logits at `positions` positions fit in CHUNK_BYTES, as do their
        weights in float32, which a CPU needs."""
        width = max(256, CHUNK_BYTES // (4 * max(positions, self.weight.shape[1])))
        for start in range(0, self.vocabulary, width):
            yield start, min(start + width, self.vocabulary)

    def save(self, path: Path) -> None:
        tensors = {"weight": self.weight.detach().cpu().contiguous()}
        if self.bias is not None:
            tensors["bias"] = self.bias.detach().cpu().contiguous()
        metadata = {} if self.softcap is None else {"softcap": repr(self.softcap)}
        save_file(tensors, path, metadata=metadata)

    @classmethod
    def load(cls, path: Path, device: str) -> "Head":
        with safe_open(path, framework="pt", device=device) as file:
            softcap = (file.metadata() or {}).get("softcap")
            bias = file.get_tensor("bias") if "bias" in file.keys() else None  # noqa: SIM118 (no iterator)
            return cls(file.get_tensor("weight"), bias, None if softcap is None else float(softcap))


def nats_of(hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> torch.Tensor:
    """−ln p(target) at each position.

    Args:
        hidden: [n, hidden], final hidden states that predict `targets` [n].

    Returns:
        float32 [n], natural logarithm.
    """
    log_sum, picked = log_sum_and_logit(hidden, targets, head)
    return log_sum - picked


def log_sum_and_logit(
    hidden: torch.Tensor, targets: torch.Tensor, head: Head, first: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two halves of −ln p = ln Σ exp(logits) − logit(target), of a whole head or of one shard of it.

    Args:
        hidden, targets: as for `nats_of`.
        head: rows `first` and following of a head that is shared out over several devices.

    Returns:
        float32 [n] each; the logit is −∞ where the target lies in another shard.
    """
    parts = [
        _log_sum_and_logit(h, t - first, head)
        for h, t in zip(hidden.split(CHUNK_POSITIONS), targets.split(CHUNK_POSITIONS), strict=True)
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _log_sum_and_logit(
    hidden: torch.Tensor, targets: torch.Tensor, head: Head
) -> tuple[torch.Tensor, torch.Tensor]:
    total = _RunningSum(hidden)
    picked = torch.full_like(total.maximum, -torch.inf)
    for start, stop in head.chunks(len(hidden)):
        logits = head.logits(hidden, start, stop)
        inside = (targets >= start) & (targets < stop)
        column = (targets - start).clamp(0, stop - start - 1)
        picked = torch.where(inside, logits.gather(1, column[:, None])[:, 0], picked)
        total.add(logits)
    return total.log(), picked


class _RunningSum:
    """log Σ exp over chunks that arrive one after another; `add` overwrites the chunk it is given."""

    def __init__(self, like: torch.Tensor) -> None:
        self.maximum = torch.full((len(like),), -torch.inf, device=like.device)
        self.sum = torch.zeros(len(like), device=like.device)

    def add(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the factor by which earlier sums shrank, and exp(logits − maximum) in place of logits."""
        maximum = torch.maximum(self.maximum, logits.amax(1))
        shrink = torch.exp(self.maximum - maximum)
        weights = logits.sub_(maximum[:, None]).exp_()
        self.sum = self.sum * shrink + weights.sum(1)
        self.maximum = maximum
        return shrink, weights

    def log(self) -> torch.Tensor:
        return self.maximum + self.sum.log()


def divergence_of(
    baseline: tuple[torch.Tensor, Head], candidate: tuple[torch.Tensor, Head]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kullback–Leibler divergence and top-1 agreement at each position.

    KL(P‖Q) = E_P[ln p − ln q], with P the baseline; with unnormalised logits a, b and log-normalisers A, B it
    is E_P[a − b] − A + B, which one pass over the vocabulary gives.

    Args:
        baseline, candidate: hidden states [n, hidden] and the head of each.

    Returns:
        float32 [n] in nats, and bool [n]: both models rank the same token first.
    """
    kl, agree = [], []
    pairs = zip(baseline[0].split(CHUNK_POSITIONS), candidate[0].split(CHUNK_POSITIONS), strict=True)
    for base, cand in pairs:
        one_kl, one_agree = _divergence(base, baseline[1], cand, candidate[1])
        kl.append(one_kl)
        agree.append(one_agree)
    return torch.cat(kl), torch.cat(agree)


def _divergence(
    base: torch.Tensor, base_head: Head, cand: torch.Tensor, cand_head: Head
) -> tuple[torch.Tensor, torch.Tensor]:
    base_sum, cand_sum = _RunningSum(base), _RunningSum(cand)
    gap = torch.zeros_like(base_sum.sum)
    base_top, cand_top = _RunningArgmax(base), _RunningArgmax(cand)
    for start, stop in base_head.chunks(2 * len(base)):
        a, b = base_head.logits(base, start, stop), cand_head.logits(cand, start, stop)
        base_top.add(a, start)
        cand_top.add(b, start)
        difference = a - b
        shrink, weights = base_sum.add(a)
        gap = gap * shrink + (weights * difference).sum(1)
        cand_sum.add(b)
    kl = gap / base_sum.sum - base_sum.log() + cand_sum.log()
    return kl.clamp_min(0), base_top.index == cand_top.index


class _RunningArgmax:
    def __init__(self, like: torch.Tensor) -> None:
        self.best = torch.full((len(like),), -torch.inf, device=like.device)
        self.index = torch.zeros(len(like), dtype=torch.long, device=like.device)

    def add(self, logits: torch.Tensor, offset: int) -> None:
        value, index = logits.max(1)
        self.index = torch.where(value > self.best, index + offset, self.index)
        self.best = torch.maximum(self.best, value)
