"""The far end of a sweep: one group of cells, measured on a node as on any machine, and sent home.

Nothing in here imports Ray, and nothing stays on the node: each record leaves, with the files beside it, as
soon as its cell is over.
"""

import os
import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from evalsuite.core.errors import EvalError, ModelError
from evalsuite.core.spec import Serving, SpeedSpec
from evalsuite.data.corpora import Corpus
from evalsuite.engines.process import ProcessGenerator
from evalsuite.run.forecast import refuse_impossible
from evalsuite.run.speed import Plan, run_sweep
from evalsuite.run.subject import prepare
from evalsuite.store.runs import RunStore
from evalsuite.telemetry.machine import read_machine


@dataclass(frozen=True)
class Source:
    """Where a node finds what its cells name: their paths may be relative to the driver's folder.

    Attributes:
        model, tokenizer: as `evalsuite.data.models.local_name` has them.
        fingerprint: of the model's weights, as the driver has them.
    """

    model: str
    tokenizer: str | None
    fingerprint: str


@dataclass(frozen=True)
class Said:
    """What a sweep says while it runs."""

    text: str


@dataclass(frozen=True)
class CellFiles:
    """A finished cell: the files of its folder, ``run.json`` among them, by name."""

    files: dict[str, bytes] = field(repr=False)


@dataclass(frozen=True)
class Ended:
    """The group is over; `error` is what ended it early."""

    error: EvalError | None


News = Said | CellFiles | Ended


def measure_group(
    group: Sequence[SpeedSpec], corpus: Corpus, source: Source, seed: int, threads: str | None
) -> Iterator[News]:
    """Measure cells that share a loaded model.

    Args:
        threads: the driver's OMP_NUM_THREADS. Ray sets it to a task's CPUs, one where it has a GPU, and the
            engine would inherit that.
    """
    os.environ.pop("OMP_NUM_THREADS", None)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = threads
    news: queue.SimpleQueue[News | None] = queue.SimpleQueue()
    with TemporaryDirectory(prefix="hlwq-eval-") as scratch, ThreadPoolExecutor(1) as thread:
        watcher = _Watcher(RunStore(Path(scratch)), news)
        over = thread.submit(_measure, group, corpus, source, seed, watcher)
        over.add_done_callback(lambda _: news.put(None))
        while (found := news.get()) is not None:
            yield found
        try:
            over.result()
        except EvalError as error:
            yield Ended(error)
        else:
            yield Ended(None)


def _measure(
    group: Sequence[SpeedSpec], corpus: Corpus, source: Source, seed: int, watcher: "_Watcher"
) -> None:
    first = group[0]
    workload = first.workload.model_copy(update={"tokenizer": source.tokenizer})
    subjects = {first.model: prepare(source.model, first.serving, workload, corpus)}
    if (found := subjects[first.model].fingerprint) != source.fingerprint:
        raise ModelError(f"The weights on this node have the fingerprint {found[:12]}.")
    refuse_impossible(group, subjects, read_machine())

    def open_there(_model: str, serving: Serving, log: Path, load_timeout_s: float) -> ProcessGenerator:
        return ProcessGenerator(source.model, serving, log, load_timeout_s)

    run_sweep(Plan(watcher.store, subjects, seed, "fresh", watcher, open_there), group)


class _Watcher:
    """Sends every folder home once it is finished."""

    def __init__(self, store: RunStore, news: "queue.SimpleQueue[News | None]") -> None:
        self.store, self._news = store, news
        self._sent: set[Path] = set()

    def phase(self, text: str) -> None:
        self._news.put(Said(text))

    def cell(self, done: int, total: int, text: str) -> None:  # noqa: ARG002 (the driver counts for itself)
        for folder in self.store.finished("speed"):
            if folder not in self._sent:
                self._sent.add(folder)
                self._news.put(CellFiles({path.name: path.read_bytes() for path in folder.iterdir()}))
