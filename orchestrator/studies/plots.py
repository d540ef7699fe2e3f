"""Plots of studies as PNG files, with matplotlib's file backend; imported only when a plot is drawn.

Must not import torch.
"""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

DOTS_PER_INCH = 110
COLOURS = "viridis_r"


def draw_seeds(report: dict[str, Any], path: Path) -> None:
    """The results by cell, and the expected best of n."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    cells, curve = figure.subplots(1, 2)
    _draw_cells(cells, report)
    best = report["expected_best"]
    curve.plot(range(1, len(best) + 1), best, marker="o")
    curve.set(xlabel="trials (n)", ylabel=report["metric"], title="expected best of n")
    curve.set_xticks(range(1, len(best) + 1))
    curve.grid(alpha=0.3)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def draw_search(report: dict[str, Any], path: Path) -> None:
    """Parallel coordinates: one line per trial, one axis per key, the result last; unfinished trials in grey as far as
    they got.
    """
    axis_of = {axis["key"]: axis for axis in report["axes"]}
    keys = list(axis_of)
    figure = Figure(figsize=(2.2 + 1.9 * len(keys), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    results = [trial["value"] for trial in report["trials"] if trial["value"] is not None]
    low, high = min(results), max(results)
    colour_map: Any = colormaps[COLOURS if report["mode"] == "min" else COLOURS.removesuffix("_r")]
    scales = [_scale(axis) for axis in axis_of.values()]
    for trial in sorted(report["trials"], key=lambda trial: trial["value"] is not None):
        heights = [position(trial["values"][key]) for key, (position, _) in zip(keys, scales, strict=True)]
        if trial["value"] is None:
            axes.plot(range(len(keys)), heights, color="0.7", linestyle=":", linewidth=1)
            continue
        height = (trial["value"] - low) / ((high - low) or 1.0)
        width = 3 if trial["name"] == report["best"] else 1.3
        axes.plot(range(len(keys) + 1), [*heights, height], color=colour_map(height), linewidth=width)
    _draw_scales(axes, keys, [ticks for _, ticks in scales])
    axes.set_title("bold: the best; dotted: stopped as weak or failed", fontsize=9)
    figure.colorbar(ScalarMappable(Normalize(low, high), colour_map), ax=axes, label=report["metric"])
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _draw_cells(axes: Axes, report: dict[str, Any]) -> None:
    rows = list(dict.fromkeys(trial["values"]["seeds.weights"] for trial in report["trials"]))
    columns = list(dict.fromkeys(trial["values"]["seeds.data"] for trial in report["trials"]))
    cells = [[math.nan] * len(columns) for _ in rows]
    for trial in report["trials"]:
        i, j = rows.index(trial["values"]["seeds.weights"]), columns.index(trial["values"]["seeds.data"])
        value = trial[report["compared"]["column"]]
        cells[i][j] = math.nan if value is None else value
    image = axes.imshow(cells, cmap=COLOURS if report["mode"] == "min" else COLOURS.removesuffix("_r"), aspect="auto")
    for i, row in enumerate(cells):
        for j, value in enumerate(row):
            axes.text(
                j,
                i,
                "" if math.isnan(value) else f"{value:.4f}",
                ha="center",
                va="center",
                color="0.1",
                backgroundcolor="1",
            )
    axes.set(
        xlabel="seeds.data",
        ylabel="seeds.weights",
        title=f"{report['metric']} of {report['stage']} at {report['compared']['at']}",
    )
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.figure.colorbar(image, ax=axes)


def _scale(axis: dict[str, Any]) -> tuple[Callable[[str], float], list[tuple[float, str]]]:
    """(text -> height from 0 to 1, labelled heights) of one axis; numbers by size (logarithmic if searched that
    way).
    """
    if "options" in axis:
        options: list[str] = axis["options"]
        heights = {name: i / max(1, len(options) - 1) for i, name in enumerate(options)}
        return heights.__getitem__, [(height, name) for name, height in heights.items()]
    measure = math.log if axis["log"] else float
    low, high = measure(axis["low"]), measure(axis["high"])

    def position(text: str) -> float:
        return (measure(float(text)) - low) / (high - low)

    return position, [(0.0, f"{axis['low']:.3g}"), (1.0, f"{axis['high']:.3g}")]


def _draw_scales(axes: Axes, keys: Sequence[str], ticks: Sequence[Sequence[tuple[float, str]]]) -> None:
    for x, labels in enumerate(ticks):
        axes.axvline(x, color="0.3", linewidth=1)
        for height, label in labels:
            axes.annotate(label, (x, height), textcoords="offset points", xytext=(4, 2), fontsize=8)
    axes.axvline(len(keys), color="0.3", linewidth=1)
    axes.set_xticks(range(len(keys) + 1), [*(".".join(key.split(".")[-2:]) for key in keys), "result"])
    axes.set_yticks([])
    for side in ("top", "left", "right", "bottom"):
        axes.spines[side].set_visible(False)
