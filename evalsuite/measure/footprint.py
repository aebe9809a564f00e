"""What a model takes, in each phase of its life, one sampled phase after the other.

Phases: *load* until the engine can be asked, *idle* at rest after it, *prefill* from the request until the
first token of the last prompt, *decode* until the last token. What is taken in each is read from outside:
telemetry/phases.py defines it.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from evalsuite.engines.base import Generator


def live(
    engine: Generator,
    prompts: Sequence[NDArray[np.int64]],
    output_len: int,
    idle_s: float,
    phase: Callable[[str], None],
) -> None:
    """Let a loaded engine rest, then answer one round of prompts.

    Args:
        phase: told when each phase begins.
    """
    phase("idle")
    time.sleep(idle_s)
    phase("prefill")
    engine.generate(prompts, output_len, lambda: phase("decode"))
