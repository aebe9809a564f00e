"""Pictures of a footprint run: memory and disk over time, and the four VRAM numbers beside the checkpoint."""

# matplotlib types its functions in part only
# pyright: reportUnknownMemberType=false

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from evalsuite.core.telemetry import Phase, Telemetry
from evalsuite.report.footprint import gpu_absent
from evalsuite.report.plots import COLOURS, DASHES, STYLE, save_figure, spread
from evalsuite.telemetry.phases import over_gpus

BANDS = ("#f0f0f0", "#ffffff")
FEW = 50  # samples of a line whose every sample is marked
NAME_WIDTH = 0.16  # of a panel's width: what the name of a phase takes
ROUND = ("prefill", "decode")


@dataclass(frozen=True)
class Line:
    """A line of a panel; `values` in bytes over the rows of the samples, null where there is none."""

    label: str
    values: pd.Series


def over_time(samples: pd.DataFrame, telemetry: Telemetry, title: str, caption: str, out: Path) -> list[Path]:
    """VRAM, RAM, page cache and disk traffic against time, with a band for each phase.

    A panel that has nothing to show says why.

    Args:
        samples: as `evalsuite.telemetry.samples.load_samples` gives them.
        out: path without suffix.

    Returns:
        The PNG and the SVG.
    """
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 8.4), layout="constrained")
        panels: Any = figure.subplots(4, 1, sharex=True)
        phases = without_repeats(telemetry.phases)
        for axes, (name, lines, why) in zip(panels, _panels(samples, telemetry), strict=True):
            _bands(axes, phases)
            _panel(axes, samples["t_s"], name, lines, why)
        _name_bands(panels[0], phases, float(samples["t_s"].max()))
        panels[-1].set_xlabel("time since sampling began [s]")
        panels[-1].set_xlim(0, float(samples["t_s"].max()))
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, parse_math=False)
        figure.supxlabel(
            textwrap.fill(caption, 105), fontsize=8, color="#555555", x=0.01, ha="left", parse_math=False
        )
        return save_figure(figure, out)


def _panels(samples: pd.DataFrame, telemetry: Telemetry) -> list[tuple[str, list[Line], str]]:
    def line(label: str, column: str) -> Line:
        return Line(label, samples[column] if column in samples else pd.Series(np.nan, samples.index))

    def growth(label: str, column: str) -> Line:
        """Up to the end of the last phase: what ends then takes its counts along, or hands them on."""
        values = line(label, column).values.where(samples["t_s"] <= measured_s)
        return Line(label, values - values.dropna().iloc[0] if values.notna().any() else values)

    def why(*columns: str) -> str:
        return next((telemetry.absent[c] for c in columns if c in telemetry.absent), "nothing was read")

    measured_s = max((phase.stop_s for phase in telemetry.phases), default=math.inf)
    cached = [c for c in samples.columns if c.startswith("page_cache_")]
    disk = [c for c in samples.columns if c.startswith("disk_expert")]
    gpus = sum(c.startswith("gpu") and c.endswith("_used_bytes") for c in samples.columns)
    return [
        (
            "VRAM",
            [
                Line("device" if gpus < 2 else f"{gpus} devices", over_gpus(samples, "used_bytes")),
                line("process tree", "gpu_process_bytes"),
            ],
            gpu_absent(telemetry),
        ),
        ("RAM", [line("RSS", "rss_bytes"), line("PSS", "pss_bytes")], why("rss_bytes", "pss_bytes")),
        (
            "page cache",
            [line(_purpose(c, "page_cache_"), c) for c in cached],
            why(*(name for name in telemetry.absent if name.startswith("page_cache_")), "page_cache"),
        ),
        (
            "disk",
            [
                growth("read", "disk_read_bytes"),
                growth("written", "disk_written_bytes"),
                *(line(_purpose(c, "disk_"), c) for c in disk),
            ],
            why("disk_read_bytes", "disk_written_bytes"),
        ),
    ]


def _purpose(column: str, prefix: str) -> str:
    return column.removeprefix(prefix).removesuffix("_bytes").replace("_", " ")


def _panel(axes: Any, times: pd.Series, name: str, lines: Sequence[Line], why: str) -> None:
    shown = [line for line in lines if line.values.notna().any()]
    axes.set_ylabel(f"{name} [GB]")
    if not shown:
        axes.set_yticks([])
        axes.text(
            0.5, 0.5, textwrap.fill(f"absent: {why}", 80), transform=axes.transAxes, ha="center",
            va="center", color="#555555", parse_math=False,
        )  # fmt: skip
        return
    for line, colour, dash in zip(shown, COLOURS, DASHES, strict=False):
        there = line.values.notna()
        marker = "." if there.sum() < FEW else None  # between two marks nothing is known
        axes.plot(
            times[there], line.values[there] / 1e9, dash, color=colour, linewidth=1.6, marker=marker,
            label=line.label,
        )  # fmt: skip
    top = max(float(line.values.max()) for line in shown) / 1e9
    if top:
        axes.set_ylim(0, 1.15 * top)
    else:
        axes.set_yticks([0])
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def without_repeats(phases: Sequence[Phase]) -> list[Phase]:
    """The phases, with several rounds of prefill and decode one after the other as one."""
    found: list[Phase] = []
    for is_round, some in groupby(phases, lambda phase: phase.name in ROUND):
        rounds = list(some)
        if is_round and len(rounds) > len(ROUND):
            found.append(
                Phase(name="prefill, decode, …", start_s=rounds[0].start_s, stop_s=rounds[-1].stop_s)
            )
        else:
            found += rounds
    return found


def _bands(axes: Any, phases: Sequence[Phase]) -> None:
    axes.grid(visible=False, axis="x")
    for number, phase in enumerate(phases):
        axes.axvspan(phase.start_s, phase.stop_s, color=BANDS[number % 2], lw=0, zorder=0)
        for edge in (phase.start_s, phase.stop_s):
            axes.axvline(edge, color="#bbbbbb", linewidth=0.8, zorder=0.5)


def _name_bands(axes: Any, phases: Sequence[Phase], whole_s: float) -> None:
    """Names above the bands, moved apart where bands are narrow, each tied to its band by a line."""
    centres = [(phase.start_s + phase.stop_s) / 2 / (whole_s or 1) for phase in phases]
    for phase, centre, place in zip(phases, centres, spread(centres, NAME_WIDTH), strict=True):
        axes.annotate(
            phase.name,
            (centre, 1.0),
            xycoords="axes fraction",
            xytext=(place, 1.1),
            textcoords="axes fraction",
            ha="center",
            va="bottom",
            fontsize=9,
            parse_math=False,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0},
        )


def vram_bars(
    numbers: Mapping[str, int | str], checkpoint_bytes: int | None, title: str, caption: str, out: Path
) -> list[Path]:
    """The four VRAM numbers as bars, with the checkpoint's size; a number that is absent says why instead.

    Args:
        numbers: as `evalsuite.report.footprint.vram_numbers` gives them.
        checkpoint_bytes: None where the weights come from no file.
        out: path without suffix.

    Returns:
        The PNG and the SVG.
    """
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        axes: Any = figure.add_subplot()
        rows: dict[str, int | str] = {
            "checkpoint on disk": "dummy weights come from no file"
            if checkpoint_bytes is None
            else checkpoint_bytes,
            **numbers,
        }
        sizes = [value / 1e9 for value in rows.values() if isinstance(value, int)]
        widest = max(sizes, default=0.0) or 1.0
        for position, value in enumerate(rows.values()):
            if isinstance(value, str):
                text = textwrap.shorten(f"absent: {value}", 84, placeholder=" …")
                axes.text(
                    0.01 * widest, position, text, va="center", fontsize=9, color="#555555", parse_math=False
                )
                continue
            colour = "#999999" if position == 0 else COLOURS[0]
            axes.barh(position, value / 1e9, color=colour, height=0.6)
            axes.text(value / 1e9 + 0.01 * widest, position, f"{value / 1e9:.3g} GB", va="center", fontsize=9)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, 1.14 * widest)
        axes.set_xlabel("GB (10⁹ bytes)")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, parse_math=False)
        figure.supxlabel(
            textwrap.fill(caption, 105), fontsize=8, color="#555555", x=0.01, ha="left", parse_math=False
        )
        return save_figure(figure, out)
