"""Scores two windows in vLLM with two ranks and keeps nats and head: two_ranks.py CHECKPOINT OUT-FOLDER."""

import sys
from pathlib import Path

import numpy as np

from evalsuite.core.spec import Serving
from evalsuite.data.models import find_checkpoint
from evalsuite.data.windows import TokenWindow
from evalsuite.engines.vllm_scorer import VllmScorer


def main(folder: str, out: Path) -> None:
    serving = Serving(engine="vllm", dtype="float32", enforce_eager=True, tensor_parallel_size=2)
    scorer = VllmScorer(find_checkpoint(folder), serving, context=64, keep_hidden=True)
    windows = [TokenWindow(0, np.arange(60), 20), TokenWindow(1, np.arange(100, 140), 1)]
    for score in scorer.score(windows):
        np.save(out / f"{score.index}.npy", score.nats)
    scorer.save_head(out / "head.safetensors")
    scorer.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
