"""What our harness adds: seconds of a request measured by it, over those that `vllm bench latency` measures.

    python experiments/benchmarks/harness_overhead.py MODEL --pairs 3 --out FILE.json

Both arms load the same vLLM with the same arguments and send the same number of prompts of the same length
for the same number of tokens, in processes of their own, turn about; which comes first alternates. Ours is
the time from the first submission to the last token, by the stamps of `ProcessGenerator`; theirs is what
`vllm bench latency` prints, around `LLM.generate`. Theirs draws tokens at temperature 1 and ours takes the
most likely one, which cannot be set there; neither decodes text. Printed are each pair's ratios of medians
and of the fastest, and the ratio of medians over all pairs with its 95 % t-interval; the aim is at most 1.02.
The machine must be idle: an arm lasts seconds, and whatever else runs meanwhile is in its ratio.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from evalsuite.core.spec import Serving
from evalsuite.core.stats import t_interval
from evalsuite.data.models import Checkpoint, find_checkpoint
from evalsuite.engines.process import ProcessGenerator, device_environment
from evalsuite.engines.vllm_arguments import engine_arguments, engine_environment, vllm_installed
from evalsuite.telemetry.machine import read_machine

LOAD_TIMEOUT_S = 1800.0
SMALLEST_VOCABULARY = 10_000  # vllm bench draws its token ids below this


def command_line(arguments: dict[str, Any]) -> list[str]:
    """Arguments of `EngineArgs` as flags of the command."""
    flags: list[str] = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def theirs(
    checkpoint: Checkpoint, serving: Serving, options: argparse.Namespace, **environment: str
) -> list[float]:
    """Latencies in seconds by `vllm bench latency`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "latency.json"
        subprocess.run(
            [
                sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "latency",
                *command_line(engine_arguments(checkpoint, serving)),
                "--input-len", str(options.input_len), "--output-len", str(options.output_len),
                "--batch-size", str(options.concurrency), "--num-iters", str(options.iterations),
                "--num-iters-warmup", str(options.warmups), "--disable-detokenize",
                "--output-json", str(out),
            ],
            env=device_environment(serving.gpus) | engine_environment(serving) | environment,
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        return json.loads(out.read_text())["latencies"]


def ours(model: str, serving: Serving, options: argparse.Namespace) -> list[float]:
    """Latencies in seconds by our stamps."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, SMALLEST_VOCABULARY, options.input_len) for _ in range(options.concurrency)]
    with tempfile.TemporaryDirectory() as folder:
        engine = ProcessGenerator(model, serving, Path(folder) / "engine.log", LOAD_TIMEOUT_S)
        try:
            engine.start()
            times: list[float] = []
            for _ in range(options.warmups + options.iterations):
                done = engine.generate(prompts, options.output_len, lambda: None)
                times.append(
                    max(float(one.token_s[-1]) for one in done) - min(one.submitted_s for one in done)
                )
        finally:
            engine.close()
    return times[options.warmups :]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The model, the workload, and how often it is repeated."""
    parser.add_argument("model")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--gpu", type=int)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--warmups", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", type=Path)


def main() -> None:
    """Measure, print, and write the latencies and ratios."""
    parser = argparse.ArgumentParser(description="Our harness against vllm bench latency.")
    add_flags(parser)
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-model-len", type=int)
    options = parser.parse_args()
    serving = Serving(
        engine="vllm", load_format=options.load_format, dtype=options.dtype, enforce_eager=options.eager,
        gpus=() if options.gpu is None else (options.gpu,), max_model_len=options.max_model_len,
    )  # fmt: skip
    checkpoint = find_checkpoint(options.model, weights=options.load_format != "dummy")
    pairs: list[dict[str, list[float]]] = []
    for number in range(options.pairs):
        pair: dict[str, list[float]] = {}
        for arm in ("ours", "theirs") if number % 2 == 0 else ("theirs", "ours"):
            pair[arm] = (
                ours(options.model, serving, options)
                if arm == "ours"
                else theirs(checkpoint, serving, options)
            )
        pairs.append(pair)
        for name, best in (("median", statistics.median), ("fastest", min)):
            one, other = best(pair["ours"]), best(pair["theirs"])
            print(
                f"pair {number + 1}, {name}: ours {one:.4f} s, vllm bench latency {other:.4f} s, "
                f"ratio {one / other:.4f}",
                flush=True,
            )
    logs = np.log([statistics.median(pair["ours"]) / statistics.median(pair["theirs"]) for pair in pairs])
    interval = t_interval(logs)
    ratio = float(np.exp(logs.mean()))
    low, high = (float(np.exp(interval.low)), float(np.exp(interval.high))) if interval else (None, None)
    print(f"ours / theirs: {ratio:.4f}" + (f" [{low:.4f}, {high:.4f}]" if interval else ""))
    if options.out:
        settings = {
            key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()
        }
        settings["model"] = checkpoint.name
        del settings["out"]
        document = {
            "benchmark": "harness_overhead", "settings": settings, "vllm": vllm_installed(),
            "machine": read_machine().model_dump(mode="json"), "pairs_s": pairs, "ratio": ratio,
            "ratio_low": low, "ratio_high": high,
        }  # fmt: skip
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    main()
