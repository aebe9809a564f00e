"""The engine of one group of cells: opened when needed, resized between cells, replaced after a failure."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from evalsuite.core.errors import EngineDied, EvalError, StorageError, UsageError
from evalsuite.core.spec import Serving, SpeedSpec
from evalsuite.core.speed import LoadTimes
from evalsuite.engines.process import ProcessGenerator
from evalsuite.telemetry.pagecache import resident_share

Opener = Callable[[str, Serving, Path, float], ProcessGenerator]


class HeldEngine:
    """At most one child process at a time.

    Args:
        opener: makes the child process.
        log: of all its children.
        before: called before a child is opened; returns what a record must warn of.

    Attributes:
        load: of the child that runs.
        loaded_with: the cache size that it was loaded with.
        warnings: what `before` returned for it, and why it took the place of another.
    """

    def __init__(self, opener: Opener, log: Path, before: Callable[[], tuple[str, ...]]) -> None:
        self._opener, self._before = opener, before
        self._engine: ProcessGenerator | None = None
        self._started = False
        self._size: int | None = None
        self._refused: dict[int | None, EvalError] = {}
        self.log = log
        self.load: LoadTimes | None = None
        self.loaded_with: int | None = None
        self.warnings: tuple[str, ...] = ()
        self._lost: tuple[str, ...] = ()

    def adapt(self, cell: SpeedSpec) -> None:
        """Give the child that runs this cell's cache size, or end it where it cannot have it.

        What is watched from then on is the cell's own.
        """
        size = cell.serving.moe_expert_cache_size
        if self._engine is None or size == self._size or size in self._refused:
            return
        if size is None:  # what the others are held against has never been through a cache
            self.drop()
            return
        try:
            self._engine.deadline_s = time.monotonic() + cell.workload.timeout_s
            self._engine.resize_expert_cache(size)
            self._size = size
        except UsageError:  # it cannot
            self.drop()
        except EvalError as error:
            self.drop()
            self._lost = (f"the engine was loaded anew, since changing the cache size failed: {error.what}",)

    def acquire(self, cell: SpeedSpec) -> ProcessGenerator:
        """A child process for this cell: the one that runs, or a new one that has still to load.

        Raises:
            EvalError: this could not be loaded before.
        """
        size = cell.serving.moe_expert_cache_size
        if error := self._refused.get(size):
            raise error
        if self._engine is None:
            self.warnings, self._lost = (*self._lost, *self._before()), ()
            self._engine = self._opener(cell.model, cell.serving, self.log, cell.workload.timeout_s)
            self._started, self.loaded_with, self._size = False, size, size
        return self._engine

    @property
    def pid(self) -> int | None:
        """Of the child; None while there is none."""
        return self._engine.pid if self._engine is not None else None

    def start(self, weights: Sequence[Path]) -> None:
        """Load, unless it runs already; a failure is remembered for the other cells of this cache size.

        Args:
            weights: files that it reads; how much of them is in the page cache before is kept in `load`.

        Raises:
            EvalError: as `ProcessGenerator.start` has it.
        """
        assert self._engine is not None, "acquire() comes first"
        if self._started:
            return
        resident = resident_share(weights)
        try:
            self._engine.start()
        except StorageError as error:  # of its experts' files, not of the results: other cells may do without
            refusal = EngineDied(error.what, cause=error.cause, todo=error.todo)
            self._refused[self._size] = refusal
            raise refusal from error
        except EvalError as error:
            self._refused[self._size] = error
            raise
        self._started = True
        self.load = self._engine.load.model_copy(update={"resident_share": resident})

    def drop(self) -> None:
        """End the child, if there is one."""
        if self._engine is not None:
            engine, self._engine, self._started = self._engine, None, False
            engine.close()
