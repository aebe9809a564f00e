"""Pictures with a point for each of two numbers: windows of two models, and memory against speed."""

# matplotlib types its functions in part only
# pyright: reportUnknownMemberType=false

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from evalsuite.report.cache_plots import MORE_COLOURS, MORE_MARKERS
from evalsuite.report.plots import COLOURS, STYLE, save_figure


def paired_windows(
    baseline: pd.DataFrame,
    candidate: pd.DataFrame,
    names: tuple[str, str],
    title: str,
    caption: str,
    out: Path,
) -> list[Path]:
    """Nats a token of each window under two models: against each other, and the difference along the text.

    Args:
        baseline, candidate: samples of two runs on the same windows.
        names: of baseline and candidate.
        out: path without suffix.

    Returns:
        The PNG and the SVG.
    """
    import matplotlib as mpl

    counts = baseline["scored"].to_numpy(float)
    base = baseline["nats"].to_numpy(float) / counts
    mine = candidate["nats"].to_numpy(float) / counts
    gap = mine - base
    mean = float((gap * counts).sum() / counts.sum())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 4.6), layout="constrained")
        panels: Any = figure.subplots(1, 2, width_ratios=(1, 1.25))
        left, right = panels
        ends = float(min(base.min(), mine.min())), float(max(base.max(), mine.max()))
        left.plot(ends, ends, color="black", linewidth=1, label="equal")
        left.plot(base, mine, "o", color=COLOURS[0], markersize=2.6, alpha=0.5, markeredgewidth=0)
        left.set_aspect("equal")
        left.set_xlabel(f"{_short(names[0])} [nats/token]", parse_math=False)
        left.set_ylabel(f"{_short(names[1])} [nats/token]", parse_math=False)
        left.legend(frameon=False, loc="upper left")
        right.axhline(0, color="black", linewidth=1)
        right.plot(
            np.arange(len(gap)), gap, "o", color=COLOURS[0], markersize=2.6, alpha=0.5, markeredgewidth=0
        )
        right.axhline(mean, color=COLOURS[1], linestyle="--", linewidth=1.8, label=f"mean {mean:+.2g}")
        right.set_xlabel("window, from the start of the text")
        right.set_ylabel("difference [nats/token]")
        right.legend(frameon=False, loc="upper left")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, parse_math=False)
        figure.supxlabel(
            textwrap.fill(caption, 118), fontsize=8, color="#555555", x=0.01, ha="left", parse_math=False
        )
        return save_figure(figure, out)


@dataclass(frozen=True)
class Point:
    """One cell: memory in bytes and decode tokens/s with the ends of its interval; its series and label."""

    series: str
    label: str
    memory_bytes: float
    tokens_per_s: float
    low: float | None
    high: float | None


def memory_speed(points: Sequence[Point], title: str, caption: str, out: Path) -> list[Path]:
    """Decode speed against weights on the device.

    Args:
        out: path without suffix.

    Returns:
        The PNG and the SVG.
    """
    import matplotlib as mpl
    from matplotlib.ticker import LogLocator, NullFormatter

    series: dict[str, list[Point]] = {}
    for point in points:
        series.setdefault(point.series, []).append(point)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.4 + 0.15 * len(series)), layout="constrained")
        axes: Any = figure.add_subplot()
        drawn: list[Any] = []
        for here, (colour, marker) in zip(
            series.values(), cycle(zip(MORE_COLOURS, MORE_MARKERS, strict=True)), strict=False
        ):
            here.sort(key=lambda p: p.memory_bytes)
            bars = [
                [
                    min(p.tokens_per_s - p.low, 0.95 * p.tokens_per_s) if p.low is not None else 0
                    for p in here
                ],
                [p.high - p.tokens_per_s if p.high is not None else 0 for p in here],
            ]
            bar = axes.errorbar(
                [p.memory_bytes / 1e9 for p in here], [p.tokens_per_s for p in here], yerr=bars, color=colour,
                marker=marker, markersize=7, markerfacecolor="white", markeredgewidth=1.4, linewidth=0.8,
                linestyle=":", capsize=3,
            )  # fmt: skip
            drawn.append(bar)
            for point in here:
                axes.annotate(
                    point.label, (point.memory_bytes / 1e9, point.tokens_per_s), xytext=(7, 5),
                    textcoords="offset points", fontsize=8, color=colour, parse_math=False,
                )  # fmt: skip
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:,.6g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(0, 1.15 * max(p.memory_bytes for p in points) / 1e9)
        axes.set_xlabel("weights on the device, expert slots included [GB = 10⁹ bytes]")
        axes.set_ylabel("decode speed of one sequence [tokens/s]")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, parse_math=False)
        # handles and labels by hand: matplotlib leaves out labels that begin with an underscore
        legend = axes.legend(
            drawn, list(series), frameon=False, loc="lower left", bbox_to_anchor=(-0.1, 1), fontsize=8,
            handletextpad=0.2,
        )  # fmt: skip
        for text in legend.get_texts():
            text.set_parse_math(False)
        figure.supxlabel(
            textwrap.fill(caption, 105), fontsize=8, color="#555555", x=0.01, ha="left", parse_math=False
        )
        return save_figure(figure, out)


def _short(name: str) -> str:
    return name if len(name) <= 34 else name[:33] + "…"
