"""What the expert cache's plugin costs where it is installed and no cache is asked for.

    python experiments/benchmarks/plugin_idle.py MODEL --pairs 4 --out FILE.json

`vllm bench latency` runs turn about with the plugins that are installed and with none (VLLM_PLUGINS empty),
in processes of its own, the order changing from pair to pair; nothing of ours drives it. Printed are each
pair's ratio of the fastest latencies, with over without the plugin, and their geometric mean with its 95 %
t-interval. It holds 1 where the plugin costs nothing.
"""

import argparse
import json
import os

import numpy as np
from harness_overhead import add_flags, theirs

from evalsuite.core.spec import Serving
from evalsuite.core.stats import t_interval
from evalsuite.data.models import find_checkpoint
from evalsuite.engines.vllm_arguments import vllm_installed
from evalsuite.telemetry.machine import read_machine

PLUGINS = "VLLM_PLUGINS"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser)
    parser.set_defaults(output_len=64, warmups=2, iterations=8, pairs=4)
    options = parser.parse_args()
    if PLUGINS in os.environ:
        parser.error(f"{PLUGINS} is set: unset it, so that vLLM loads the plugins that are installed")
    if options.pairs < 2:
        parser.error("--pairs: an interval takes 2 or more")
    serving = Serving(
        engine="vllm", enforce_eager=options.eager, gpus=() if options.gpu is None else (options.gpu,)
    )
    checkpoint = find_checkpoint(options.model)
    pairs: list[dict[str, list[float]]] = []
    for number in range(options.pairs):
        pair: dict[str, list[float]] = {}
        for arm in ("with", "without") if number % 2 == 0 else ("without", "with"):
            chosen = {PLUGINS: ""} if arm == "without" else {}
            pair[arm] = theirs(checkpoint, serving, options, **chosen)
        pairs.append(pair)
        one, other = min(pair["with"]), min(pair["without"])
        print(
            f"pair {number + 1}: with {one:.4f} s, without {other:.4f} s, ratio {one / other:.4f}", flush=True
        )
    logs = np.log([min(pair["with"]) / min(pair["without"]) for pair in pairs])
    interval = t_interval(logs)
    assert interval is not None, "--pairs is at least 2"
    ratio, low, high = (float(np.exp(x)) for x in (logs.mean(), interval.low, interval.high))
    print(f"with / without the plugin: {ratio:.4f} [{low:.4f}, {high:.4f}]")
    if options.out:
        settings = {k: v for k, v in vars(options).items() if k not in ("model", "out")}
        document = {
            "benchmark": "plugin_idle", "model": checkpoint.name, "vllm": vllm_installed(),
            "settings": settings,
            "machine": read_machine().model_dump(mode="json"), "pairs_s": pairs, "ratio": ratio,
            "ratio_low": low, "ratio_high": high,
        }  # fmt: skip
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    main()
