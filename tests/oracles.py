"""The slow and obvious ways to score a text: full logits in float64, one forward pass a token."""

import math

import numpy as np
import torch


def full_logits(hidden, weight, bias=None, softcap=None):
    """float64 [positions, vocabulary]."""
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def nats(logits, targets):
    """−ln p(target), float64 [positions]."""
    return -logits.log_softmax(-1)[torch.arange(len(targets)), targets]


def kl(p_logits, q_logits):
    """KL(P‖Q) at each position, float64, by its definition."""
    p, q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@torch.inference_mode()
def brute_force(model, stream, windows):
    """−ln p of every scored token of every window: one forward pass a token, with nothing after it."""
    scores = []
    for window in windows:
        ids = np.array(stream.ids[window.start : window.stop])
        if stream.window_bos is not None:
            ids[0] = stream.window_bos
        one = []
        for position in range(window.first_scored - window.start, len(ids)):
            logits = model(torch.from_numpy(ids[None, :position]), use_cache=False).logits[0, -1]
            one.append(float(nats(logits.double()[None], torch.tensor([ids[position]]))[0]))
        scores.append(np.array(one))
    return scores


def perplexity(scores):
    """One sum, one division, whatever the windows' sizes."""
    return math.exp(math.fsum(math.fsum(one) for one in scores) / sum(len(one) for one in scores))
