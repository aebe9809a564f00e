"""Perplexity of a text under a protocol.

    PPL = exp( Σ −ln p(token) / scored tokens )      sums over all scored tokens, divided once

Units: nats (natural logarithm). Bits per byte divide by ln 2 and the UTF-8 bytes of the scored tokens; word
perplexity divides by their words, as lm-evaluation-harness does
(https://github.com/EleutherAI/lm-evaluation-harness, metric word_perplexity).

The nearest rival convention takes the mean of each window's mean and exponentiates that; it differs as soon
as windows hold different numbers of scored tokens, and is wrong by the weight of the short ones.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pandas as pd

from evalsuite.core.errors import OutOfMemory
from evalsuite.core.record import PerplexityResult
from evalsuite.core.spans import mean_exp, prefixes, segments, span
from evalsuite.data.tokens import TokenStream
from evalsuite.data.windows import Window, cut
from evalsuite.engines.base import Scorer
from evalsuite.store.folder import RunFolder


class Progress(Protocol):
    """Whoever watches a run."""

    def phase(self, text: str) -> None:
        """A new stage begins."""
        ...

    def scored(self, done: int, total: int, perplexity: float) -> None:
        """So many windows are scored, with the perplexity of all of them so far."""
        ...


@dataclass(frozen=True)
class ScoringRun:
    """What the scoring loop did in this process: forward passes only, load and tokenising excluded."""

    seconds: float
    scored_tokens: int
    forward_tokens: int
    batch_size: int
    resumed_from_window: int
    warnings: tuple[str, ...] = ()


def score_windows(
    scorer: Scorer,
    stream: TokenStream,
    windows: Sequence[Window],
    folder: RunFolder,
    batch_size: int | None,
    progress: Progress,
) -> ScoringRun:
    """Score the windows that `folder` does not have yet, appending each batch as it comes.

    A resumed run keeps the batch size it had, because rounding depends on it. A batch that does not fit is
    halved and tried again; single windows that do not fit end the run.

    Args:
        batch_size: windows a batch; None lets the engine measure what fits.

    Raises:
        OutOfMemory: one window alone does not fit.
        NonFiniteScore: a log-probability is not finite.
        StorageError: the disk is full.
    """
    done = len(folder.rows)
    todo = list(windows[done:])
    if folder.rows:
        batch_size = int(folder.rows[-1]["batch"])
    elif batch_size is None and todo:
        progress.phase("finding the largest batch that fits")
        batch_size = scorer.largest_batch(next(cut(stream, todo[:1])))
    size = batch_size or 1
    nats = math.fsum(folder.rows.column("nats"))
    scored = int(sum(folder.rows.column("scored")))
    scored_before, forward = scored, 0
    warnings: list[str] = []
    progress.phase("scoring")
    progress.scored(done, len(windows), mean_exp(nats, scored))
    began = time.monotonic()
    while todo:
        batch = todo[:size]
        try:
            scores = scorer.score(list(cut(stream, batch)))
        except OutOfMemory:
            if size == 1:
                raise
            size = max(1, size // 2)
            warnings.append(f"a batch of {size * 2} windows did not fit; went on with {size}")
            continue
        rows = [
            window_row(stream, w, math.fsum(score.nats), size) for w, score in zip(batch, scores, strict=True)
        ]
        folder.append(rows, [score.hidden for score in scores if score.hidden is not None])
        todo = todo[size:]
        nats += sum(row["nats"] for row in rows)
        scored += sum(row["scored"] for row in rows)
        forward += sum(w.length for w in batch)
        progress.scored(len(folder.rows), len(windows), mean_exp(nats, scored))
    seconds = time.monotonic() - began
    return ScoringRun(seconds, scored - scored_before, forward, size, done, tuple(warnings))


def window_row(stream: TokenStream, w: Window, nats: float, batch: int) -> dict[str, Any]:
    """A window's line in the store.

    Args:
        nats: Σ −ln p over its scored tokens.
        batch: windows a forward pass.
    """
    return {
        "window": w.index, "start": w.start, "first_scored": w.first_scored, "stop": w.stop,
        "scored": w.scored, "bytes": int(stream.bytes[w.first_scored : w.stop].sum()),
        "words": int(stream.words[w.first_scored : w.stop].sum()), "nats": nats, "batch": batch,
    }  # fmt: skip


def summarise(frame: pd.DataFrame, *, available: int, load_s: float, scoring: ScoringRun) -> PerplexityResult:
    """The result of a whole run from its samples.

    Args:
        frame: columns window, scored, bytes, words, nats; a row a window in text order.
        available: windows of the whole text under the protocol.
    """
    whole = span(frame, 0, len(frame))
    nats = math.fsum(frame["nats"])
    scored_bytes, words = int(frame["bytes"].sum()), int(frame["words"].sum())
    by_word = mean_exp(nats, words)
    return PerplexityResult(
        windows=len(frame),
        windows_available=available,
        scored_tokens=whole.scored_tokens,
        scored_bytes=scored_bytes,
        scored_words=words,
        nats=nats,
        perplexity=whole.perplexity,
        low=whole.low,
        high=whole.high,
        bits_per_byte=nats / math.log(2) / scored_bytes,
        word_perplexity=by_word if math.isfinite(by_word) else None,
        prefixes=prefixes(frame),
        segments=segments(frame),
        batch_size=scoring.batch_size,
        load_s=load_s,
        scoring_s=scoring.seconds,
        scored_tokens_per_s=_rate(scoring.scored_tokens, scoring.seconds),
        forward_tokens_per_s=_rate(scoring.forward_tokens, scoring.seconds),
        resumed_from_window=scoring.resumed_from_window,
    )


def _rate(count: int, seconds: float) -> float:
    return count / seconds if count else 0.0
