"""Pictures, in one style: readable in grey and by the colour-blind, PNG and SVG."""

# matplotlib types its functions in part only
# pyright: reportUnknownMemberType=false

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

# Okabe and Ito, https://jfly.uni-koeln.de/color/ : told apart with any colour vision; ordered by lightness
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D")
# the rest of that palette, and a grey, for pictures of many lines
MORE_COLOURS = (*COLOURS, "#56B4E9", "#E69F00", "#000000", "#7F7F7F")
MORE_MARKERS = (*MARKERS, "v", "P", "X", "*")
LABEL_HEIGHT = 0.045  # of the axes: what a number beside the end of a line takes
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "svg.hashsalt": "hlwq-eval",
}


def convergence(curves: Mapping[str, pd.DataFrame], title: str, caption: str, out: Path) -> list[Path]:
    """Perplexity against the number of windows, with the band of its 95 % interval.

    Args:
        curves: label to the frame of `evalsuite.core.spans.running_perplexity`.
        out: path without suffix.

    Returns:
        The PNG and the SVG.
    """
    import matplotlib as mpl
    from matplotlib.ticker import MaxNLocator

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.6), layout="constrained")
        axes: Any = figure.add_subplot()
        lines: list[Any] = []
        band = 0.18 if len(curves) < 3 else 0.1  # many bands on each other hide the lines
        for frame, colour, dash in zip(curves.values(), COLOURS, DASHES, strict=False):
            (line,) = axes.plot(frame["windows"], frame["perplexity"], dash, color=colour, linewidth=1.8)
            lines.append(line)
            axes.fill_between(frame["windows"], frame["low"], frame["high"], color=colour, alpha=band, lw=0)
        low, high = _settled_range(curves)
        _label_ends(axes, curves, low, high)
        axes.set_ylim(low, high)
        axes.set_xlim(0, 1.08 * _last_window(curves))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("windows scored, from the start of the text")
        axes.set_ylabel("perplexity")
        axes.set_title(title, loc="left", fontsize=11, parse_math=False)
        # handles and labels by hand: matplotlib leaves out labels that begin with an underscore
        legend = axes.legend(lines, list(curves), frameon=False, loc="best")
        for text in legend.get_texts():
            text.set_parse_math(False)
        figure.supxlabel(
            textwrap.fill(caption, 105), fontsize=8, color="#555555", x=0.01, ha="left", parse_math=False
        )
        return save_figure(figure, out)


def quantization_error(
    lines: Mapping[str, Mapping[int, float]], title: str, caption: str, out: Path
) -> list[Path]:
    """Relative error of the quantized weights against the layer, one line a class.

    Args:
        lines: class to layer to ‖W − Ŵ‖ / ‖W‖; a class need not be in every layer.
        out: path without suffix.

    Returns:
        The PNG and the SVG.
    """
    import matplotlib as mpl
    from matplotlib.ticker import MaxNLocator

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.6), layout="constrained")
        axes: Any = figure.add_subplot()
        styles = cycle(zip(COLOURS, DASHES, MARKERS, strict=True))
        for (name, by_layer), (colour, dash, marker) in zip(lines.items(), styles, strict=False):
            layers = sorted(by_layer)
            errors = [100 * by_layer[layer] for layer in layers]
            axes.plot(
                layers, errors, dash, color=colour, marker=marker, markersize=6, linewidth=1.5,
                markerfacecolor="white", markeredgewidth=1.4, label=name,
            )  # fmt: skip
        every = [100 * error for by_layer in lines.values() for error in by_layer.values()]
        middle = (min(every) + max(every)) / 2
        # differences of a hundredth of the error shall not fill the picture
        half = max(0.65 * (max(every) - min(every)), 0.1 * middle) or 1
        axes.set_ylim(max(0.0, middle - half), middle + half)
        first, last = (end(layer for by_layer in lines.values() for layer in by_layer) for end in (min, max))
        axes.set_xlim(first - 0.5, last + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("decoder layer")
        axes.set_ylabel("error ‖W − Ŵ‖ / ‖W‖ [%]")
        axes.set_title(title, loc="left", fontsize=11, parse_math=False)
        figure.legend(frameon=False, loc="outside right upper")
        figure.supxlabel(
            textwrap.fill(caption, 105), fontsize=8, color="#555555", x=0.01, ha="left", parse_math=False
        )
        return save_figure(figure, out)


def _four_digits(value: float) -> str:
    return f"{value:.{3 - int(math.log10(value))}f}" if 1 <= value < 9999 else f"{value:.4g}"


def _label_ends(axes: Any, curves: Mapping[str, pd.DataFrame], low: float, high: float) -> None:
    """The last value beside each line, moved apart where lines end close to each other."""
    ends = [(float(frame["perplexity"].to_numpy()[-1]), colour) for frame, colour in _coloured(curves)]
    ends.sort()
    places = spread([(value - low) / (high - low) for value, _ in ends], LABEL_HEIGHT)
    for (value, colour), place in zip(ends, places, strict=True):
        axes.annotate(
            _four_digits(value),
            (_last_window(curves), low + place * (high - low)),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=colour,
        )


def _coloured(curves: Mapping[str, pd.DataFrame]) -> list[tuple[pd.DataFrame, str]]:
    return list(zip(curves.values(), COLOURS, strict=False))


def spread(places: Sequence[float], distance: float) -> list[float]:
    """Ascending places, moved as little up, and then back below 1, as keeps them `distance` apart."""
    found: list[float] = []
    for place in places:
        found.append(max(place, found[-1] + distance) if found else place)
    limit = 1.0
    for index in reversed(range(len(found))):
        found[index] = min(found[index], limit)
        limit = found[index] - distance
    return found


def _settled_range(curves: Mapping[str, pd.DataFrame]) -> tuple[float, float]:
    """Limits that show the last nine tenths: the first windows swing far and say least."""
    lows: list[float] = []
    highs: list[float] = []
    for frame in curves.values():
        settled = frame[frame["windows"] >= _last_window({"": frame}) / 10]
        lows.append(float(np.nanmin(settled[["perplexity", "low"]].to_numpy())))
        highs.append(float(np.nanmax(settled[["perplexity", "high"]].to_numpy())))
    low, high = min(lows), max(highs)
    margin = 0.08 * (high - low) or 0.05 * high
    return low - margin, high + margin


def save_figure(figure: Figure, out: Path) -> list[Path]:
    paths = [out.with_name(out.name + suffix) for suffix in (".png", ".svg")]
    figure.savefig(paths[0], dpi=150)
    figure.savefig(paths[1], metadata={"Date": None})
    return paths


def _last_window(curves: Mapping[str, pd.DataFrame]) -> float:
    return max(float(frame["windows"].to_numpy()[-1]) for frame in curves.values())
