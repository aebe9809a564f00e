"""What a variable of vLLM's costs or gains: decode speed with it and without it, in one run.

    python experiments/benchmarks/vllm_variable.py MODEL --set VLLM_DISABLED_KERNELS=MacheteLinearKernel \\
        --out FILE.json

That one asks for other kernels of dense INT4 layers: on Hopper vLLM takes Machete for them and Marlin for
experts, and without Machete Marlin for both.

Engines with and without the variable start one after the other (with --starts 2: without, with, with,
without) and are sent the same prompts. A round is a prompt of each sequence; equal rounds are paired:

    TPOT  = (last token − first token) / (tokens − 1), mean of the sequences of a round
    ratio = exp( mean over rounds of ln TPOT without / TPOT with ), with its 95 % t-interval; above 1 the
            variable makes decoding faster

With one start of each, what one start differs from another is not in the interval. Which kernels ran is read
from the engines and stands beside the times.
"""

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalsuite.core.spec import Serving, Workload
from evalsuite.core.stats import t_interval
from evalsuite.data.corpora import load_corpus
from evalsuite.engines.process import ProcessGenerator
from evalsuite.engines.vllm_arguments import vllm_installed
from evalsuite.run.subject import Subject, prepare
from evalsuite.telemetry.machine import read_machine

CONCURRENCIES = (1, 8)


@contextmanager
def variable(name: str, value: str | None) -> Iterator[None]:
    """What the engine's process inherits; None is without it."""
    before = os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def tpots(engine: ProcessGenerator, rounds: list[list[NDArray[np.int64]]], output_len: int) -> list[float]:
    """Seconds a token after the first, in each round."""
    found = []
    for prompts in rounds:
        done = engine.generate(prompts, output_len, lambda: None)
        found.append(float(np.mean([(g.token_s[-1] - g.token_s[0]) / (output_len - 1) for g in done])))
    return found


def one_start(
    subject: Subject, serving: Serving, options: argparse.Namespace, value: str | None
) -> dict[str, Any]:
    """One engine: its kernels, seconds to load, and times a round by concurrency."""
    name = options.set[0]
    with TemporaryDirectory() as scratch, variable(name, value):
        engine = ProcessGenerator(options.model, serving, Path(scratch) / "engine.log", options.timeout)
        try:
            engine.start()
            times = {}
            for concurrency in CONCURRENCIES:
                asked = workload(options, concurrency)
                found = tpots(engine, subject.prompts(asked), options.output_len)[asked.warmups :]
                times[str(concurrency)] = found
                which = "without" if value is None else "with"
                print(f"{which} {name}, concurrency {concurrency}: {np.mean(found):.5f} s/token", flush=True)
            return {
                "with": value is not None, "kernels": engine.facts.engaged.get("kernels"),
                "device": engine.facts.device_name, "load_s": engine.load.total_s, "tpot_s": times,
            }  # fmt: skip
        finally:
            engine.close()


def workload(options: argparse.Namespace, concurrency: int) -> Workload:
    return Workload(
        corpus="builtin", input_len=options.input_len, output_len=options.output_len,
        concurrency=concurrency, repeats=options.repeats,
    )  # fmt: skip


def ratios(starts: list[dict[str, Any]]) -> dict[str, Any]:
    """By concurrency, over the rounds of all starts."""
    found = {}
    for concurrency in map(str, CONCURRENCIES):
        without, with_it = (
            np.concatenate([start["tpot_s"][concurrency] for start in starts if start["with"] == asked])
            for asked in (False, True)
        )
        logs = np.log(without / with_it)
        interval = t_interval(logs)
        assert interval is not None, "--repeats is at least 2"
        found[concurrency] = {
            "ratio": float(np.exp(logs.mean())),
            "low": float(np.exp(interval.low)),
            "high": float(np.exp(interval.high)),
        }
    return found


def assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text} is no NAME=VALUE")
    return name, value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--set", type=assignment, required=True, metavar="NAME=VALUE")
    parser.add_argument("--starts", type=int, choices=(1, 2), default=1, help="of engines of each kind")
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="auto")
    parser.add_argument("--moe-routing", default="model")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=1800.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.repeats < 2:
        parser.error("--repeats: an interval takes 2 or more")
    serving = Serving(
        engine="vllm", load_format=options.load_format, moe_routing=options.moe_routing,
        enforce_eager=options.eager, max_num_seqs=max(CONCURRENCIES), max_model_len=options.max_model_len,
        max_num_batched_tokens=options.max_model_len,
    )  # fmt: skip
    subject = prepare(options.model, serving, workload(options, 1), load_corpus("builtin"))
    value = options.set[1]
    order = [None, value, value, None][: 2 * options.starts]
    starts = [one_start(subject, serving, options, asked) for asked in order]
    document = {
        "benchmark": "vllm_variable", "model": subject.checkpoint.name, "vllm": vllm_installed(),
        "settings": {k: v for k, v in vars(options).items() if k not in ("model", "out")},
        "machine": read_machine().model_dump(mode="json"), "starts": starts, "ratios": ratios(starts),
    }  # fmt: skip
    print(json.dumps(document["ratios"], indent=1))
    print("the same kernels ran" if starts[0]["kernels"] == starts[1]["kernels"] else "other kernels ran")
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
