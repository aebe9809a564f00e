"""The convergence picture: there, right in its numbers, and the same bytes twice."""

import re
import warnings
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from matplotlib import rcParams
from matplotlib.image import imread

from evalsuite.report.plots import COLOURS, convergence

SVG = "{http://www.w3.org/2000/svg}"


def curve(windows: int, *, intervals: bool = True, level: float = 6.5) -> pd.DataFrame:
    """As core.spans.running_perplexity gives it: below ten windows there is no interval."""
    n = np.arange(1, windows + 1, dtype=float)
    perplexity = level + 3 / n * np.cos(n)
    half = np.where((n >= 10) & intervals, 2 / np.sqrt(n), np.nan)
    return pd.DataFrame(
        {"windows": n, "perplexity": perplexity, "low": perplexity - half, "high": perplexity + half}
    )


def draw(curves: dict[str, pd.DataFrame], out: Path) -> list[Path]:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", UserWarning
        )  # a legend without entries, a glyph that is missing, limits that are NaN
        return convergence(curves, "Perplexity on wikitext-2", "card-1155: context 1536.", out)


@pytest.mark.parametrize(
    "curves",
    [
        {"one": curve(120)},
        {"few windows": curve(6)},
        {"one window": curve(1)},
        {"no interval at all": curve(120, intervals=False)},
        {"candidate": curve(120), "baseline": curve(60, level=7)},
        {"with": curve(120), "without": curve(8, intervals=False)},
        {
            "constant": pd.DataFrame(
                {"windows": [1.0, 2.0], "perplexity": [5.0, 5.0], "low": np.nan, "high": np.nan}
            )
        },
    ],
    ids=lambda c: " and ".join(c),
)
def test_both_pictures_are_written(tmp_path: Path, curves: dict[str, pd.DataFrame]):
    png, svg = draw(curves, tmp_path / "convergence")
    assert (png.name, svg.name) == ("convergence.png", "convergence.svg")
    pixels = imread(png)
    assert pixels.shape[:2] == (690, 1200)
    assert pixels[..., :3].std() > 0.01  # not a blank sheet
    assert ElementTree.parse(svg).getroot().tag == f"{SVG}svg"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["convergence.png", "convergence.svg"]


def test_a_dot_in_the_name_is_kept(tmp_path: Path):
    assert draw({"a": curve(20)}, tmp_path / "Qwen3.5")[0].name == "Qwen3.5.png"


def test_the_same_data_give_the_same_svg(tmp_path: Path):
    first = draw({"a": curve(50), "b": curve(40)}, tmp_path / "first")[1]
    second = draw({"a": curve(50), "b": curve(40)}, tmp_path / "second")[1]
    assert first.read_bytes() == second.read_bytes()
    assert b"<dc:date>" not in first.read_bytes()
    other = draw({"a": curve(50, level=6.6), "b": curve(40)}, tmp_path / "third")[1]
    assert other.read_bytes() != first.read_bytes()


def test_the_same_data_give_the_same_png(tmp_path: Path):
    pictures = [draw({"a": curve(50)}, tmp_path / name)[0].read_bytes() for name in ("first", "second")]
    assert pictures[0] == pictures[1]


def test_drawing_leaves_no_settings_behind(tmp_path: Path):
    before = dict(rcParams)
    draw({"a": curve(20)}, tmp_path / "x")
    assert dict(rcParams) == before


def lines_of(svg: Path) -> list[np.ndarray]:
    """The curves of the picture, in points: the paths in a curve's colour that are drawn and not filled."""
    found = []
    for path in ElementTree.parse(svg).getroot().iter(f"{SVG}path"):
        style = path.get("style", "")
        if "fill: none" in style and any(colour.lower() in style.lower() for colour in COLOURS):
            numbers = [float(x) for x in re.findall(r"-?\d+\.?\d*", path.get("d", ""))]
            if len(numbers) > 8:
                found.append(np.array(numbers).reshape(-1, 2))
    return found


def test_the_curve_has_the_shape_of_its_data(tmp_path: Path):
    frame = curve(100)
    frame["perplexity"] = np.linspace(6, 7, 100) + 0.2 * np.sin(np.arange(100))
    frame["low"], frame["high"] = frame["perplexity"] - 0.1, frame["perplexity"] + 0.1
    (line,) = lines_of(draw({"a": frame}, tmp_path / "x")[1])
    assert len(line) == 100
    # a linear map from data to points, y downwards
    assert np.corrcoef(line[:, 0], frame["windows"])[0, 1] == pytest.approx(1, abs=1e-9)
    assert np.corrcoef(line[:, 1], frame["perplexity"])[0, 1] == pytest.approx(-1, abs=1e-6)


def test_the_first_windows_do_not_flatten_the_rest(tmp_path: Path):
    """Perplexity 400 after one window, 6.5 at the end: the settled part takes most of the height."""
    frame = curve(200, intervals=False)
    frame["perplexity"] = 6.5 + 0.05 * np.sin(frame["windows"] / 9)
    frame.loc[0, "perplexity"] = 400.0
    (line,) = lines_of(draw({"a": frame}, tmp_path / "x")[1])
    settled = line[-180:, 1]
    assert settled.max() - settled.min() > 150  # points, of about 330 in height


@pytest.mark.parametrize(
    "label", ["a|b", "costs $5 and $6", "a$\\frac$", "<b>&", "_hidden", "100 %", "{x}^2_3"]
)
def test_labels_are_text_and_nothing_else(tmp_path: Path, label: str):
    """Names of models and files: a dollar opens no formula, a leading underscore hides nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        png, svg = convergence(
            {label: curve(20)}, f"Perplexity on {label}", f"{label}: caption.", tmp_path / "x"
        )
    assert png.stat().st_size > 0
    ElementTree.parse(svg)
    plain = convergence({"plain": curve(20)}, "t", "c", tmp_path / "y")[1].read_text()
    assert svg.read_text().count('id="legend_1"') == plain.count('id="legend_1"') == 1


def test_a_long_caption_stays_inside_the_picture(tmp_path: Path):
    """The caption of a comparison has some 150 characters: none is cut off at the right edge."""
    caption = " ".join(["interval"] * 17)
    png = convergence({"a": curve(50)}, "Perplexity on wikitext-2", caption, tmp_path / "x")[0]
    below_the_axes = imread(png)[-50:, :, :3]
    assert below_the_axes.min() < 0.7
    assert below_the_axes[:, -8:].min() == 1.0  # a space is narrower than that
