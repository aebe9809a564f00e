"""A candidate against a baseline on the same windows.

    Δ ln PPL = (Σ nats candidate − Σ nats baseline) / scored tokens

Paired by window, so that the text's own variation, far larger than the effect of quantisation, cancels. The
divergence is KL(baseline ‖ candidate) in nats a token over the full vocabulary, as in
https://github.com/ggml-org/llama.cpp/tree/master/tools/perplexity; top-1 agreement is the share of tokens at
which both rank the same token first. The nearest rival, the ratio of two separately rounded perplexities,
has no error bar and hides disagreements that average out.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evalsuite.core.errors import NotComparable
from evalsuite.core.record import CompareResult, Divergence, PerplexityResult, Record
from evalsuite.core.stats import bootstrap_ratio, percentile_interval, two_sided_p


def require_comparable(baseline: Record, candidate: Record) -> tuple[PerplexityResult, PerplexityResult]:
    """The two perplexity results, if they differ in nothing but the model and how it was computed.

    Raises:
        NotComparable: naming every difference.
    """
    results: list[PerplexityResult] = []
    for record in (baseline, candidate):
        if not isinstance(record.results, PerplexityResult) or record.status != "ok":
            raise NotComparable(
                f"{record.run_id} is not a finished perplexity run.", todo="give runs of `hlwq-eval ppl`."
            )
        results.append(record.results)
    first, second = results
    differences = [
        f"{what}: {left} against {right}"
        for what, left, right in (
            ("text", _text(baseline), _text(candidate)),
            ("tokenizer", _tokenizer(baseline), _tokenizer(candidate)),
            ("protocol", _protocol(baseline), _protocol(candidate)),
            ("windows", first.windows, second.windows),
        )
        if left != right
    ]
    if differences:
        raise NotComparable(
            f"{candidate.run_id} cannot be compared with {baseline.run_id}.",
            cause="they differ in " + "; ".join(differences) + ".",
            todo="score both with the same --corpus, --tokenizer, --protocol and --limit.",
        )
    return first, second


def compare(
    baseline: Record,
    candidate: Record,
    frames: tuple[pd.DataFrame, pd.DataFrame],
    divergence: tuple[NDArray[np.float64], NDArray[np.bool_]] | None,
    absent: str | None,
) -> CompareResult:
    """Paired statistics of two runs on the same windows.

    Args:
        frames: samples of baseline and candidate.
        divergence: KL in nats and top-1 agreement at each scored token, shape [tokens]; or None,
            in which case `absent` says why.

    Raises:
        NotComparable: as `require_comparable`.
    """
    base_result, cand_result = require_comparable(baseline, candidate)
    base, cand = frames
    counts = base["scored"].to_numpy(float)
    gaps = cand["nats"].to_numpy(float) - base["nats"].to_numpy(float)
    samples = bootstrap_ratio(gaps, counts)
    interval = None if samples is None else percentile_interval(samples)
    return CompareResult(
        baseline_run=baseline.run_id,
        candidate_run=candidate.run_id,
        windows=len(base),
        scored_tokens=int(counts.sum()),
        baseline_perplexity=base_result.perplexity,
        candidate_perplexity=cand_result.perplexity,
        delta_ln_ppl=float(gaps.sum() / counts.sum()),
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        p_value=None if samples is None else two_sided_p(samples),
        divergence=None if divergence is None else summarise_divergence(*divergence, base["scored"].tolist()),
        divergence_absent=absent,
    )


def summarise_divergence(
    kl: NDArray[np.float64], agree: NDArray[np.bool_], scored: Sequence[int]
) -> Divergence:
    """Mean, median and 99th percentile of the divergence; agreement with an interval over windows."""
    counts = np.asarray(scored)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    by_window = np.add.reduceat(agree.astype(np.float64), starts)
    samples = bootstrap_ratio(by_window, counts.astype(np.float64))
    interval = None if samples is None else percentile_interval(samples)
    return Divergence(
        tokens=len(kl),
        mean=float(kl.mean()),
        median=float(np.median(kl)),
        p99=float(np.quantile(kl, 0.99)),
        top1_agreement=float(agree.mean()),
        top1_agreement_low=interval.low if interval else None,
        top1_agreement_high=interval.high if interval else None,
    )


def _text(record: Record) -> str:
    return f"{record.text.corpus} ({record.text.sha256[:12]})" if record.text else "unknown"


def _tokenizer(record: Record) -> str:
    return record.text.tokenizer_sha256[:12] if record.text else "unknown"


def _protocol(record: Record) -> str:
    if record.protocol is None:
        return "unknown"
    return str(record.protocol.model_dump(exclude={"name"}))
