"""Pictures of an expert cache: hit rate and predicted speed against its size, and who uses which expert."""

# matplotlib types its functions in part only
# pyright: reportUnknownMemberType=false

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from evalsuite.experts.belady import Belady
from evalsuite.report.plots import DASHES, MORE_COLOURS, MORE_MARKERS, STYLE, save_figure

MORE_DASHES = (*DASHES, *DASHES)
HEAT = "cividis"  # even in lightness, and made for colour-blind readers
WIDEST = 4  # powers of two either side of even use that colours tell apart at most


@dataclass(frozen=True)
class SpeedCurve:
    """Predicted tokens/s of one GPU.

    Attributes:
        sizes, tokens_per_s: as far as the cache fits.
    """

    name: str
    sizes: Sequence[int]
    tokens_per_s: Sequence[float]


def hit_rates(
    curves: Mapping[str, Mapping[int, float]],
    experts: int,
    top_k: int | None,
    title: str,
    caption: str,
    out: Path,
) -> list[Path]:
    """Decode hit rate against the cache size, a line a policy; Belady's optimum above them in black.

    Args:
        curves: policy to size to hit rate, 0 to 1.
        top_k: experts that a token takes; None where it is not known.
        out: path without suffix.

    Returns:
        The PNG and the SVG.
    """
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.8), layout="constrained")
        axes: Any = figure.add_subplot()
        if Belady.name in curves:
            sizes = sorted(curves[Belady.name])
            rates = [100 * curves[Belady.name][size] for size in sizes]
            axes.plot(sizes, rates, "-", color="black", linewidth=2.2, label="belady: the bound", zorder=3)
        styles = zip(MORE_COLOURS, MORE_DASHES, MORE_MARKERS, strict=True)
        for (policy, by_size), (colour, dash, marker) in zip(
            ((p, c) for p, c in curves.items() if p != Belady.name), styles, strict=False
        ):
            sizes = sorted(by_size)
            axes.plot(
                sizes, [100 * by_size[size] for size in sizes], dash, color=colour, marker=marker,
                markersize=4.5, linewidth=1.5, markerfacecolor="white", label=policy,
            )  # fmt: skip
        if top_k is not None:
            _mark_top_k(axes, top_k)
        _size_axis(axes, experts)
        axes.set_ylim(0, 102)
        axes.set_ylabel("decode hit rate [%]")
        axes.set_title(title, loc="left", fontsize=11, parse_math=False)
        axes.legend(frameon=False, loc="best")
        _caption(figure, caption)
        return save_figure(figure, out)


def predicted_speeds(
    curves: Sequence[SpeedCurve], experts: int, top_k: int, title: str, caption: str, out: Path
) -> list[Path]:
    """Predicted tokens/s against the cache size, a line a GPU, up to the largest cache that fits it.

    Args:
        out: path without suffix.

    Returns:
        The PNG and the SVG.
    """
    import matplotlib as mpl
    from matplotlib.ticker import LogLocator, NullFormatter

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.8), layout="constrained")
        axes: Any = figure.add_subplot()
        styles = cycle(zip(MORE_COLOURS, MORE_DASHES, MORE_MARKERS, strict=True))
        for curve, (colour, dash, marker) in zip(curves, styles, strict=False):
            axes.plot(
                curve.sizes, curve.tokens_per_s, dash, color=colour, marker=marker, markersize=4.5,
                linewidth=1.5, markerfacecolor="white", label=curve.name,
            )  # fmt: skip
        _mark_top_k(axes, top_k)
        _size_axis(axes, experts)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(_speed)
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel("decoded tokens/s at most (derived)")
        axes.set_title(title, loc="left", fontsize=11, parse_math=False)
        axes.legend(frameon=False, loc="upper left")
        _caption(figure, caption)
        return save_figure(figure, out)


def expert_use(
    counts: NDArray[np.int64], layers: Sequence[int], title: str, caption: str, out: Path
) -> list[Path]:
    """How often each expert of each layer was chosen, against even use.

    Args:
        counts: int64 [layers, experts].
        out: path without suffix.

    Returns:
        The PNG and the SVG.
    """
    import matplotlib as mpl
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    relative: NDArray[np.float64] = counts / np.maximum(counts.mean(axis=1, keepdims=True), 1e-12)
    distance = float(np.quantile(np.abs(np.log2(np.maximum(relative, 2.0**-WIDEST))), 0.98))
    span = 2.0 ** min(max(math.ceil(distance), 1), WIDEST)
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(9, 2.3 + min(0.35 * len(layers), 7)), layout="constrained")
        axes: Any = figure.add_subplot()
        image = axes.imshow(
            np.maximum(relative, 1 / span), aspect="auto", cmap=HEAT, norm=LogNorm(1 / span, span),
            interpolation="nearest",
        )  # fmt: skip
        bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=30, extend="both")
        bar.set_label("use / even use")
        bar.ax.yaxis.set_major_locator(LogLocator(base=2, numticks=12))
        bar.ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        bar.ax.yaxis.set_minor_locator(NullLocator())
        every = -(-len(layers) // 20)
        axes.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
        axes.set_ylabel("decoder layer")
        axes.set_xlabel("expert")
        axes.set_title(title, loc="left", fontsize=11, parse_math=False)
        _caption(figure, caption)
        return save_figure(figure, out)


def _size_axis(axes: Any, experts: int) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    axes.set_xscale("log", base=2)
    axes.set_xlim(0.93, 1.1 * experts)
    ticks = [1 << i for i in range(experts.bit_length()) if 1 << i <= experts]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"experts of each layer on the device, of {experts}")


def _speed(tokens_per_s: float, _: int) -> str:
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 1 else f"{tokens_per_s:g}"


def _mark_top_k(axes: Any, top_k: int) -> None:
    axes.axvline(top_k, color="#999999", linewidth=1, linestyle=":")
    axes.annotate(
        f" top-{top_k}: below it every token overflows", (top_k, 1), xycoords=("data", "axes fraction"),
        xytext=(-2, -2), textcoords="offset points", fontsize=8, color="#555555", va="top", ha="right",
        rotation=90,
    )  # fmt: skip


def _caption(figure: Figure, caption: str) -> None:
    figure.supxlabel(
        textwrap.fill(caption, 105), fontsize=8, color="#555555", x=0.01, ha="left", parse_math=False
    )
