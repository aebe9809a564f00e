"""Which of vLLM's kernels is faster for dense INT4 layers: the one it chooses, or the next one it would take?

    python experiments/benchmarks/dense_int4_kernels.py MODEL --without MacheteLinearKernel --out FILE.json

On Hopper vLLM takes Machete for dense layers of compressed-tensors INT4 and Marlin for the experts; without
Machete it takes Marlin for both. Two engines in one run, the second with `VLLM_DISABLED_KERNELS`, get the
same prompts; a round is a prompt of each sequence, and rounds are paired:

    TPOT  = (last token − first token) / (tokens − 1), mean of the sequences of a round
    ratio = exp( mean over rounds of ln TPOT chosen / TPOT without ), with its 95 % t-interval; above 1 the
            kernel that vLLM did not choose is faster

Which kernels ran is read from the engines. If those are the same, the arms are too, and the benchmark fails.
"""

import argparse
import json
import os
import sys
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

DISABLED = "VLLM_DISABLED_KERNELS"
CONCURRENCIES = (1, 8)


@contextmanager
def disabled(kernel: str | None) -> Iterator[None]:
    """What the engine's process inherits."""
    before = os.environ.pop(DISABLED, None)
    if kernel is not None:
        os.environ[DISABLED] = kernel
    try:
        yield
    finally:
        os.environ.pop(DISABLED, None)
        if before is not None:
            os.environ[DISABLED] = before


def tpots(engine: ProcessGenerator, rounds: list[list[NDArray[np.int64]]], output_len: int) -> list[float]:
    """Seconds a token after the first, in each round."""
    found = []
    for prompts in rounds:
        done = engine.generate(prompts, output_len, lambda: None)
        found.append(float(np.mean([(g.token_s[-1] - g.token_s[0]) / (output_len - 1) for g in done])))
    return found


def arm(
    kernel: str | None, subject: Subject, serving: Serving, options: argparse.Namespace
) -> dict[str, Any]:
    """One engine: its kernels, seconds to load, and times a round by concurrency."""
    with TemporaryDirectory() as scratch, disabled(kernel):
        engine = ProcessGenerator(options.model, serving, Path(scratch) / "engine.log", options.timeout)
        try:
            engine.start()
            times = {}
            for concurrency in CONCURRENCIES:
                asked = workload(options, concurrency)
                found = tpots(engine, subject.prompts(asked), options.output_len)[asked.warmups :]
                times[str(concurrency)] = found
                print(
                    f"{kernel} disabled, concurrency {concurrency}: {np.mean(found):.5f} s/token", flush=True
                )
            facts = engine.facts
            return {
                "disabled": kernel, "kernels": facts.engaged.get("kernels"), "device": facts.device_name,
                "load_s": engine.load.total_s, "tpot_s": times,
            }  # fmt: skip
        finally:
            engine.close()


def workload(options: argparse.Namespace, concurrency: int) -> Workload:
    return Workload(
        corpus="builtin", input_len=options.input_len, output_len=options.output_len,
        concurrency=concurrency, repeats=options.repeats,
    )  # fmt: skip


def ratios(chosen: dict[str, Any], without: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for concurrency in map(str, CONCURRENCIES):
        logs = np.log(np.divide(chosen["tpot_s"][concurrency], without["tpot_s"][concurrency]))
        interval = t_interval(logs)
        assert interval is not None, "--repeats is at least 2"
        found[concurrency] = {
            "ratio": float(np.exp(logs.mean())),
            "low": float(np.exp(interval.low)),
            "high": float(np.exp(interval.high)),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--without", default="MacheteLinearKernel")
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
    arms = [arm(kernel, subject, serving, options) for kernel in (None, options.without)]
    if arms[0]["kernels"] == arms[1]["kernels"]:
        sys.exit(f"Both engines ran the same kernels, {arms[0]['kernels']}: nothing was compared.")
    document = {
        "benchmark": "dense_int4_kernels", "model": subject.checkpoint.name, "vllm": vllm_installed(),
        "settings": {k: v for k, v in vars(options).items() if k not in ("model", "out")},
        "machine": read_machine().model_dump(mode="json"), "arms": arms, "ratios": ratios(*arms),
    }  # fmt: skip
    print(json.dumps(document["ratios"], indent=1))
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
