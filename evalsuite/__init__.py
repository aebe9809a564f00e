"""Benchmarks and evaluates quantized language models, and keeps the evidence."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

__version__ = "0.1.0"


def load_results(path: "str | Path" = "results") -> "pd.DataFrame":
    """All finished runs of a results folder as one tidy table: see `evalsuite.report.export.load_results`."""
    from evalsuite.report.export import load_results as load  # pandas is not paid for by --help

    return load(path)
