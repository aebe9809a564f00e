"""Runs `VllmGenerator` on one checkpoint after the other and writes what came: generate.py JOBS OUT LOG.

JOBS is JSON: of each the folder, settings of `Serving`, prompts, output length and rounds. LOG is the file that
the output of this process goes to.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

from evalsuite.core.errors import EvalError
from evalsuite.core.spec import Serving
from evalsuite.data.models import find_checkpoint
from evalsuite.engines.vllm_offline import VllmGenerator


def run(job: dict, log: Path) -> dict:
    serving = Serving(**job["serving"])
    began = time.monotonic()
    try:
        generator = VllmGenerator(
            find_checkpoint(job["folder"], weights=serving.load_format != "dummy"), serving, log
        )
    except EvalError as error:
        return {"error": type(error).__name__, "what": error.what, "cause": error.cause, "todo": error.todo}
    ready_s = time.monotonic() - began
    rounds = []
    for _ in range(job["rounds"]):
        first: list[float] = []
        began = time.monotonic()
        results = generator.generate(
            [np.array(prompt) for prompt in job["prompts"]],
            job["output_len"],
            lambda first=first: first.append(time.monotonic()),
        )
        rounds.append(
            {
                "began_s": began, "ended_s": time.monotonic(), "first_s": first,
                "ids": [r.ids.tolist() for r in results], "submitted_s": [r.submitted_s for r in results],
                "token_s": [r.token_s.tolist() for r in results],
            }
        )  # fmt: skip
    refused = ""
    try:
        generator.generate([np.arange(serving.max_model_len)], 2, lambda: None)
    except EvalError as error:
        refused = error.what
    generator.reset_counters()
    memory = generator.memory()
    generator.close()
    generator.close()
    return {
        "ready_s": ready_s, "rounds": rounds, "refused": refused, "load": generator.load.model_dump(),
        "facts": generator.facts.model_dump(mode="json"), "memory": memory.model_dump(),
    }  # fmt: skip


if __name__ == "__main__":
    jobs, out, log = sys.argv[1:]
    Path(out).write_text(json.dumps([run(job, Path(log)) for job in json.loads(jobs)]))
