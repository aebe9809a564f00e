"""How fast an expert cache is simulated, next to the policies in plain Python.

Quantity: token-layer steps per second on one core, a step being one decoded token in one layer: top-8 of 256
experts, as in the 35B-A3B. Routing is synthetic: each layer's experts have popularities from a Dirichlet
distribution of concentration 0.3, and with probability 0.35 an expert of the token before is chosen again.
Both sides run the same steps; the ratio is of their rates, and their misses must be equal. Compilation is not
timed. The aim is 10⁶ steps a second for every policy and size.

    python experiments/benchmarks/cache_simulation.py --out simulation.json
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import numba
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout that is not installed

from evalsuite.experts.belady import Belady
from evalsuite.experts.policy import make_policy
from evalsuite.experts.simulate import CODES, LayerSteps, count, steps_of
from evalsuite.telemetry.machine import read_machine

EXPERTS, TOP_K = 256, 8
AIM = 1e6
REUSE = 0.35


def synthetic_sets(steps: int, seed: int = 0) -> list[list[int]]:
    """Ascending distinct experts of each step."""
    rng = np.random.default_rng(seed)
    popularity = np.log(rng.dirichlet(np.full(EXPERTS, 0.3)) + 1e-6)
    fresh = np.argsort(popularity + rng.gumbel(size=(steps, EXPERTS)), axis=1)[:, ::-1]
    sets: list[list[int]] = [fresh[0, :TOP_K].tolist()]
    for row, keep in zip(fresh[1:], rng.random((steps - 1, TOP_K)) < REUSE, strict=True):
        kept = [e for e, stays in zip(sets[-1], keep, strict=True) if stays]
        others = [e for e in row[: 2 * TOP_K].tolist() if e not in kept]
        sets.append(sorted(kept + others[: TOP_K - len(kept)]))
    return sets


def python_run(name: str, size: int, sets: list[list[int]]) -> tuple[float, int]:
    """Seconds and misses of the policy in plain Python."""
    begun = time.perf_counter()
    policy = Belady(size, EXPERTS, sets) if name == "belady" else make_policy(name, size, EXPERTS)
    misses = sum(len(group.loads) for wanted in sets for group in policy.serve(wanted))
    return time.perf_counter() - begun, misses


def compiled_run(name: str, size: int, layer: LayerSteps, repeats: int) -> tuple[list[float], int]:
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        misses = int(count(layer, name, size).misses.sum())
        seconds.append(time.perf_counter() - begun)
    return seconds, misses


def main() -> None:
    parser = argparse.ArgumentParser(description="Token-layer steps a second of the cache simulator.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--steps", type=int, default=200_000, help="of the compiled side")
    parser.add_argument("--python-steps", type=int, default=4_000)
    parser.add_argument("--sizes", default="8,64,128")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    sets = synthetic_sets(args.steps)
    whole, short = steps_of(sets, EXPERTS), steps_of(sets[: args.python_steps], EXPERTS)
    rows = []
    print(f"{'policy':8}{'size':>6}{'hit rate':>10}{'steps/s':>12}{'Python':>10}{'ratio':>8}{'of aim':>8}")
    for size in map(int, args.sizes.split(",")):
        for name in CODES:
            python_s, expected = python_run(name, size, sets[: args.python_steps])
            if compiled_run(name, size, short, 1)[1] != expected:
                raise SystemExit(f"{name} at {size}: the simulator and the policy disagree")
            seconds, misses = compiled_run(name, size, whole, args.repeats)
            rate, python_rate = args.steps / statistics.median(seconds), args.python_steps / python_s
            hit_rate = 1 - misses / len(whole.wanted)
            rows.append(
                {
                    "policy": name, "size": size, "hit_rate": hit_rate, "seconds": seconds,
                    "steps_per_s": rate, "python_steps_per_s": python_rate, "ratio": rate / python_rate,
                    "share_of_aim": rate / AIM,
                }
            )  # fmt: skip
            print(
                f"{name:8}{size:6}{hit_rate:10.1%}{rate:12,.0f}{python_rate:10,.0f}{rate / python_rate:8.0f}"
                f"{rate / AIM:8.2f}"
            )
    result = {
        "cpu": read_machine().cpu, "python": platform.python_version(), "numba": numba.__version__,
        "experts": EXPERTS, "top_k": TOP_K, "steps": args.steps, "python_steps": args.python_steps,
        "rows": rows,
    }  # fmt: skip
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
