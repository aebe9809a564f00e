"""The far end: one engine in a Ray actor, which scores blocks of windows.

Nothing in here imports Ray. What the suite raises on purpose is returned as a value; whatever else ends a
call, ends the worker.
"""

import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evalsuite.cluster.blocks import Block
from evalsuite.cluster.dispatch import BlockScores
from evalsuite.core.cache import CacheCounters
from evalsuite.core.errors import EvalError, ModelError
from evalsuite.core.record import Machine, ModelFacts
from evalsuite.core.spec import PerplexitySpec
from evalsuite.core.telemetry import Telemetry
from evalsuite.data.models import find_checkpoint
from evalsuite.data.tokens import TokenStream
from evalsuite.data.windows import cut, window
from evalsuite.engines.base import Scorer
from evalsuite.engines.scorers import ScorerChoice, choose_scorer, open_scorer
from evalsuite.telemetry.machine import read_machine


@dataclass(frozen=True)
class NodeReport:
    """What a node has; `fingerprint` is of its copy of the model."""

    machine: Machine
    fingerprint: str | EvalError


@dataclass(frozen=True)
class Opened:
    """A loaded model.

    Attributes:
        choice: the engine, and what its samples depend on.
        largest_batch: by measurement; None where the spec gives the batch size.
    """

    facts: ModelFacts
    choice: ScorerChoice
    load_s: float
    largest_batch: int | None


@dataclass(frozen=True)
class Closing:
    """What is known at the end of a worker."""

    expert_cache: CacheCounters | None
    memory: Telemetry


def report_node(model: str | None) -> NodeReport:
    """Look at this node, and fetch the model where one is named and not in its cache; runs once a node."""
    try:
        fingerprint = "" if model is None else find_checkpoint(model).fingerprint()
    except EvalError as error:
        return NodeReport(read_machine(), error)
    return NodeReport(read_machine(), fingerprint)


class ScoringWorker:
    """One engine.

    Args:
        spec: of the run, its model as `evalsuite.data.models.local_name` has it.
        threads: on the CPU, as the driver has them, since rounding depends on it.
    """

    def __init__(self, spec: PerplexitySpec, threads: int) -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch is imported
        self._spec = spec
        self._scorer: Scorer | None = None
        self._stream: TokenStream | None = None

    def open(self, ids: NDArray[np.int64], window_bos: int | None, fingerprint: str) -> Opened | EvalError:
        """Load the model.

        Args:
            ids: of the whole text, in the node's object store.
            fingerprint: of the weights that are to be scored.
        """
        none = np.zeros(0, np.int64)
        self._stream = TokenStream(ids, none, none, window_bos)
        try:
            checkpoint = find_checkpoint(self._spec.model)
            if (found := checkpoint.fingerprint()) != fingerprint:
                raise ModelError(f"The weights on this node have the fingerprint {found[:12]}.")
            choice = choose_scorer(self._spec, checkpoint)
            self._scorer = open_scorer(choice, self._spec, checkpoint)
            largest = None
            if self._spec.batch_size == "auto":
                first = window(0, len(ids), self._spec.protocol)
                largest = self._scorer.largest_batch(next(cut(self._stream, [first])))
        except EvalError as error:
            return error
        return Opened(self._scorer.facts, choice, self._scorer.load_s, largest)

    def score(self, block: Block) -> BlockScores | EvalError:
        """Score a block batch by batch."""
        assert self._scorer is not None, "open() comes first"
        assert self._stream is not None, "open() comes first"
        nats: list[float] = []
        hidden: list[NDArray[np.uint16]] = []
        try:
            for start in range(block.start, block.stop, block.batch):
                indices = range(start, min(start + block.batch, block.stop))
                windows = [window(i, len(self._stream), self._spec.protocol) for i in indices]
                scores = self._scorer.score(list(cut(self._stream, windows)))
                nats += [math.fsum(score.nats) for score in scores]
                hidden += [score.hidden for score in scores if score.hidden is not None]
        except EvalError as error:
            return error
        return BlockScores(tuple(nats), tuple(hidden))

    def head(self) -> bytes | EvalError:
        """The output head as a safetensors file."""
        assert self._scorer is not None, "open() comes first"
        with tempfile.TemporaryDirectory(prefix="hlwq-eval-") as scratch:
            path = Path(scratch) / "head.safetensors"
            try:
                self._scorer.save_head(path)
            except EvalError as error:
                return error
            return path.read_bytes()

    def close(self) -> Closing | EvalError:
        """End the engine; it is of no further use."""
        assert self._scorer is not None, "open() comes first"
        try:
            closing = Closing(self._scorer.expert_cache(), self._scorer.memory())
            self._scorer.close()
        except EvalError as error:
            return error
        return closing
