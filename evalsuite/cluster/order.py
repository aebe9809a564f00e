"""What the workers of a run are to do, and who is told of them."""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evalsuite.cluster.nodes import Demand
from evalsuite.core.record import Machine
from evalsuite.core.spec import PerplexitySpec


class Watcher(Protocol):
    """Whoever is told what happens to the workers."""

    def phase(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def workers(self, count: int) -> None: ...


@dataclass(frozen=True)
class Order:
    """What every worker of a run is to do.

    Attributes:
        spec: of the run; its model is named so that it means the same in any folder.
        fingerprint: of the weights that the driver found.
        threads: of torch on the CPU.
        driver: whose library versions every node must have.
        workers: at most so many; None takes what the cluster has.
    """

    spec: PerplexitySpec
    ids: NDArray[np.int64] = field(repr=False)
    window_bos: int | None
    fingerprint: str
    threads: int
    driver: Machine
    demand: Demand
    gpu_kind: str | None = None
    workers: int | None = None
