"""A sweep by a scripted engine in a process of its own, to be killed: ``sweep_driver.py FOLDER``."""

import sys
from pathlib import Path

from evalsuite.run import speed
from run import conftest


def main(folder):
    speed.measure_bandwidth = lambda gpu: conftest.BANDWIDTH
    bench = conftest.Bench(folder)
    bench.play(token_s=0.05)
    found = bench.run()
    print(len(bench.opened), [f.record.status for f in found])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
