"""A plot of accuracy over the interpolation weight a, if matplotlib is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.merging.selection import Scores


def draw_curves(
    path: Path, alphas: Sequence[float], scores: Sequence[Scores], *, shifts: Mapping[str, bool], chosen: float
) -> str:
    """Write a PNG with a line per set, dashed for shifted sets; return a sentence on where it is, or how to get it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no picture: matplotlib is not installed; type pip install 'finetune-orchestrator[plots]'"
    measure = "accuracy" if all(scores[0][name].accuracy is not None for name in shifts) else "loss"
    order = sorted(range(len(alphas)), key=alphas.__getitem__)
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, is_shift in shifts.items():
        values: list[Any] = [scores[i][name].accuracy if measure == "accuracy" else scores[i][name].loss for i in order]
        label = f"{name} (shift)" if is_shift else name
        axes.plot([alphas[i] for i in order], values, "o--" if is_shift else "o-", label=label, markersize=4)
    axes.axvline(chosen, color="grey", linewidth=0.8, linestyle=":", label=f"chosen: a = {chosen:g}")
    axes.set_xlabel("a in (1 - a) theta_0 + a theta_1")
    axes.set_ylabel(measure if measure == "accuracy" else "loss, nats per token")
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    return f"picture: {path}"
