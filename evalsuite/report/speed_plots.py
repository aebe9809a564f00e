"""Pictures of a speed sweep: speed against the size of the expert cache, and eager against CUDA graphs."""

# matplotlib types its functions in part only
# pyright: reportUnknownMemberType=false

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from evalsuite.core.speed import Estimate
from evalsuite.report.plots import COLOURS, DASHES, MORE_COLOURS, MORE_MARKERS, STYLE, save_figure
from evalsuite.report.speed_cell import Row, mode_pairs, slots

SPEED = "decode speed of one sequence [tokens/s]"


def cache_curves(rows: Sequence[Row], caption: str, out: Path) -> list[Path]:
    """Decode speed against cache size, a line for each mode, concurrency and kind of cache, with its bound.

    Args:
        rows: of one model, with at least two cache sizes; no cache counts as one.
        out: path without suffix.

    Returns:
        The PNG and the SVG.
    """
    import matplotlib as mpl
    from matplotlib.ticker import LogLocator

    given = {row.spec.serving.moe_expert_cache_size for row in rows}
    sizes = [*sorted(size for size in given if size is not None), *({None} & given)]
    lines: dict[str, list[tuple[int, Row]]] = {}
    for row in rows:
        place = sizes.index(row.spec.serving.moe_expert_cache_size)
        lines.setdefault(_line_name(row, rows), []).append((place, row))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.8 + 0.15 * len(lines)), layout="constrained")
        axes: Any = figure.add_subplot()
        styles = cycle(zip(MORE_COLOURS, MORE_MARKERS, strict=True))
        for (name, points), (colour, marker) in zip(lines.items(), styles, strict=False):
            points.sort(key=lambda point: point[0])
            places = [place for place, _ in points]
            speeds = [row.result.decode_tokens_per_s for _, row in points]
            axes.errorbar(
                places, [s.mean for s in speeds], yerr=_bars(speeds), color=colour, marker=marker,
                markerfacecolor="white", markeredgewidth=1.4, linestyle="none", capsize=3, label=name,
            )  # fmt: skip
            means = dict(zip(places, (s.mean for s in speeds), strict=True))
            axes.plot(*_with_gaps(means, len(sizes)), color=colour, linewidth=1.6)
            bounds = {place: r.result.bound.tokens_per_s for place, r in points if r.result.bound}
            if bounds:
                axes.plot(*_with_gaps(bounds, len(sizes)), DASHES[3], color=colour, linewidth=1.2, marker="_")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:,.6g}")
        axes.minorticks_off()
        axes.margins(x=0.08)
        axes.set_xticks(range(len(sizes)), ["all, no cache" if size is None else str(size) for size in sizes])
        axes.set_xlabel("experts of each layer on the device")
        axes.set_ylabel(SPEED)
        title = f"{rows[0].model}: speed and expert cache" + _on_one_device(rows)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, parse_math=False)
        axes.legend(
            frameon=False, loc="lower left", bbox_to_anchor=(-0.1, 1), fontsize=8, ncols=2,
            handletextpad=0.2, columnspacing=1,
        )  # fmt: skip
        _caption(figure, caption)
        return save_figure(figure, out)


def mode_bars(rows: Sequence[Row], caption: str, out: Path) -> list[Path]:
    """Decode speed in eager mode and with CUDA graphs side by side, a pair for each cell that has both.

    Args:
        rows: with at least one such pair.
        out: path without suffix.

    Returns:
        The PNG and the SVG.
    """
    import matplotlib as mpl

    pairs = mode_pairs(rows)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 1.6 + 0.8 * len(pairs)), layout="constrained")
        axes: Any = figure.add_subplot()
        for place, pair in enumerate(pairs):
            for offset, row, name, colour in ((-0.2, pair[0], "eager", 1), (0.2, pair[1], "graphs", 0)):
                speed = row.result.decode_tokens_per_s
                axes.barh(
                    place + offset, speed.mean, 0.36, color=COLOURS[colour], label=None if place else name
                )
                axes.annotate(
                    f"{speed.mean:.3g}", (speed.mean, place + offset), xytext=(4, 0),
                    textcoords="offset points", va="center", fontsize=9, zorder=4,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
                )  # fmt: skip
            if bound := pair[1].result.bound:
                axes.plot(
                    [bound.tokens_per_s] * 2, [place - 0.42, place + 0.42], color="black", linewidth=1.6,
                    label=None if place else "bound",
                )  # fmt: skip
        axes.set_yticks(range(len(pairs)), [_pair_name(eager, rows) for eager, _ in pairs])
        for text in axes.get_yticklabels():
            text.set_parse_math(False)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(SPEED)
        whose = f"{rows[0].model}: " if len({row.model for row in rows}) == 1 else ""
        title = f"{whose or 'Decoding: '}eager mode and CUDA graphs{_on_one_device(rows)}"
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, parse_math=False)
        figure.legend(frameon=False, loc="outside right center")
        _caption(figure, caption)
        return save_figure(figure, out)


def _with_gaps(values: Mapping[int, float], places: int) -> tuple[list[int], list[float]]:
    """For a line that breaks off at places where nothing was measured."""
    return list(range(places)), [values.get(place, math.nan) for place in range(places)]


def _bars(speeds: Sequence[Estimate]) -> list[list[float]]:
    """Distances to the ends of the intervals, none where there is only one repeat."""
    lows = [s.mean - s.low if s.low is not None else 0.0 for s in speeds]
    highs = [s.high - s.mean if s.high is not None else 0.0 for s in speeds]
    # a speed is positive, and an axis of logarithms has no room for what is not
    return [[min(low, 0.95 * s.mean) for low, s in zip(lows, speeds, strict=True)], highs]


def _line_name(row: Row, rows: Sequence[Row]) -> str:
    parts = [*([] if _on_one_device(rows) else [row.device]), row.mode]
    if len({r.spec.workload.concurrency for r in rows}) > 1:
        parts.append(f"concurrency {row.spec.workload.concurrency}")
    if len({r.spec.serving.tensor_parallel_size for r in rows}) > 1:
        parts.append(f"tensor parallel {row.spec.serving.tensor_parallel_size}")
    return ", ".join((*parts, *cache_words(row, rows)))


def cache_words(row: Row, rows: Sequence[Row]) -> list[str]:
    """Policy, store and routing of a cell, where they are not the same in all that are cached."""
    serving, given = row.spec.serving, [r.spec.serving for r in rows if r.cached]
    words = [
        (row.routing, {s.moe_routing for s in given}),
        (f"{serving.moe_expert_store} store", {s.moe_expert_store for s in given}),
        (serving.moe_expert_cache_policy, {s.moe_expert_cache_policy for s in given}),
    ]
    return [word for word, values in words if len(values) > 1]


def _on_one_device(rows: Sequence[Row]) -> str:
    """For a title; empty where there are several, which the labels name then."""
    places, devices = ({getattr(row, name) for row in rows} for name in ("place", "device"))
    return f", {(places if len(places) == 1 else devices).pop()}" if len(devices) == 1 else ""


def _pair_name(row: Row, rows: Sequence[Row]) -> str:
    serving, parts = row.spec.serving, [f"concurrency {row.spec.workload.concurrency}"]
    if len({r.spec.serving.moe_expert_cache_size for r in rows}) > 1:
        parts.insert(0, "all experts" if slots(row.spec) == "all" else f"cache {slots(row.spec)}")
    if serving.tensor_parallel_size > 1:
        parts.append(f"tensor parallel {serving.tensor_parallel_size}")
    names = [] if len({r.model for r in rows}) == 1 else [row.model]
    names += [] if _on_one_device(rows) else [row.device]
    return "\n".join(filter(None, (", ".join(names), ", ".join(parts))))


def _caption(figure: Figure, text: str) -> None:
    figure.supxlabel(
        textwrap.fill(text, 105), fontsize=8, color="#555555", x=0.01, ha="left", parse_math=False
    )
