"""No engine hands on a log-probability that is not finite."""

import numpy as np
from numpy.typing import NDArray

from evalsuite.core.errors import NonFiniteScore
from evalsuite.data.windows import TokenWindow


def refuse_non_finite(nats: NDArray[np.float64], window: TokenWindow) -> None:
    """Raises NonFiniteScore, naming the first such token of the window.

    Args:
        nats: −ln p of the window's scored tokens, [scored].
    """
    wrong = np.flatnonzero(~np.isfinite(nats))
    if len(wrong):
        place = window.offset + int(wrong[0])
        raise NonFiniteScore(
            f"Window {window.index}, token {place} (id {int(window.ids[place])}) has log-probability "
            f"{-float(nats[wrong[0]])}.",
            cause="damaged weights, or a type whose range the activations leave (float16 often does).",
            todo="try --dtype float32; if it stays, the checkpoint is broken. Nothing was skipped.",
        )
