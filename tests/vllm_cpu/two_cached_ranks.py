"""Generates in vLLM with two ranks and an expert cache of two sizes: two_cached_ranks.py CHECKPOINT OUT-FILE."""

import json
import sys
from pathlib import Path

import numpy as np

from evalsuite.core.spec import Serving
from evalsuite.data.models import find_checkpoint
from evalsuite.engines.vllm_offline import VllmGenerator


def main(folder: str, out: Path) -> None:
    serving = Serving(
        engine="vllm", enforce_eager=True, tensor_parallel_size=2, moe_expert_cache_size=8, max_model_len=64
    )
    engine = VllmGenerator(find_checkpoint(folder), serving, out.with_suffix(".log"))
    found = []
    for size in (8, 2):
        engine.resize_expert_cache(size)
        engine.reset_counters()
        (generated,) = engine.generate([np.array([5])], 8, lambda: None)
        counters = engine.expert_cache()
        assert counters is not None
        found.append({"tokens": generated.ids.tolist(), "counters": counters.model_dump(mode="json")})
    engine.close()
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
