"""What sampling costs: decode speed with and without a watch at 20 Hz, turn about, in one run.

    python experiments/benchmarks/telemetry_overhead.py --model demo --engine torch --out FILE.json

The engine runs in a process of its own, as in every speed and footprint run; the watch runs in this one. Each
pair of rounds sends the same prompt twice, once watched and once not, the order changing from pair to pair.
Times are the engine process's own:

    TPOT  = (last token − first token) / (tokens − 1)
    ratio = exp( mean over pairs of ln TPOT watched / TPOT alone ), with its 95 % t-interval

The aim is a ratio below 1.01. Beside it stand what one sample takes and the share of one core that all
sampling took.
"""

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from scipy import stats

from evalsuite.core.spec import Serving, Workload
from evalsuite.data.corpora import load_corpus
from evalsuite.engines.process import ProcessGenerator
from evalsuite.run.subject import prepare
from evalsuite.telemetry.gpu import visible_gpus
from evalsuite.telemetry.machine import read_machine
from evalsuite.telemetry.watch import Watch

AIM = 1.01


def tpot_s(engine: ProcessGenerator, prompt: Any, output_len: int) -> float:
    """Seconds a token after the first, of one request."""
    (answer,) = engine.generate([prompt], output_len, lambda: None)
    return float(answer.token_s[-1] - answer.token_s[0]) / (output_len - 1)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Load once, then alternate."""
    serving = Serving(engine=args.engine, load_format=args.load_format, enforce_eager=args.enforce_eager)
    workload = Workload(
        corpus=args.corpus, input_len=args.input_len, output_len=args.output_len, repeats=args.pairs
    )
    subject = prepare(args.model, serving, workload, load_corpus(args.corpus))
    warmup, *rounds = [prompt for (prompt,) in subject.prompts(workload)]
    weights = [] if args.load_format == "dummy" else subject.checkpoint.weight_files()
    gpus = visible_gpus((), 1)
    tpots = np.empty((len(rounds), 2))
    samples, spent_s, watched_s, notes = 0, 0.0, 0.0, set[str]()
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        engine = ProcessGenerator(args.model, serving, folder / "engine.log", args.timeout)
        try:
            engine.start()
            tpot_s(engine, warmup, args.output_len)
            for number, prompt in enumerate(rounds):
                for watched in (number % 2 == 0, number % 2 == 1):
                    if not watched:
                        tpots[number, 0] = tpot_s(engine, prompt, args.output_len)
                        continue
                    with Watch(folder, engine.pid, gpus, {"checkpoint": weights}, hz=args.hz) as watch:
                        began = time.monotonic()
                        tpots[number, 1] = tpot_s(engine, prompt, args.output_len)
                        watched_s += time.monotonic() - began
                    samples, spent_s = samples + watch.samples, spent_s + watch.spent_s
                    notes |= {s.reason for s in watch.summary().series if s.reason}
                print(f"pair {number + 1}: ratio {tpots[number, 1] / tpots[number, 0]:.4f}", flush=True)
        finally:
            engine.close()
    logs = np.log(tpots[:, 1] / tpots[:, 0])
    half = float(stats.t.ppf(0.975, len(logs) - 1)) * float(logs.std(ddof=1)) / len(logs) ** 0.5
    return {
        "benchmark": "telemetry_overhead",
        "machine": read_machine().model_dump(),
        "model": args.model,
        "engine": engine.facts.computed,
        "device": engine.facts.device_name,
        "hz": args.hz,
        "pairs": args.pairs,
        "output_len": args.output_len,
        "tpot_alone_s": tpots[:, 0].tolist(),
        "tpot_watched_s": tpots[:, 1].tolist(),
        "ratio": float(np.exp(logs.mean())),
        "ratio_low": float(np.exp(logs.mean() - half)),
        "ratio_high": float(np.exp(logs.mean() + half)),
        "aim": AIM,
        "samples": samples,
        "achieved_hz": samples / watched_s,
        "sampling_s_per_sample": spent_s / samples,
        "sampling_share_of_a_core": spent_s / watched_s,
        "series_notes": sorted(notes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--corpus", default="builtin")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--hz", type=float, default=20.0)
    parser.add_argument("--timeout", type=float, default=1800.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = measure(args)
    print(json.dumps({key: value for key, value in found.items() if key != "machine"}, indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
