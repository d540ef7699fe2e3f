"""Formats found or chosen settings as a table with reasons. Must not import torch."""

from __future__ import annotations

from rich.table import Table

from orchestrator.config.run import RunConfig
from orchestrator.planning.settings_search import Advice, Option

SHOWN = 8


def explanation(advice: Advice) -> list[str]:
    """Why the first option is first, compared with the best of those that differ in one setting."""
    best = advice.best
    assert best is not None
    lines = [f"the fastest that fits: {' '.join(best.overrides())}"]
    for what in ("sharding", "checkpointing"):
        others = [option for option in advice.options if getattr(option, what) != getattr(best, what)]
        if others:
            lines.append(f"  against {_difference(best, others[0])}")
    return lines


def _difference(best: Option, other: Option) -> str:
    overrides = " ".join(other.overrides(best))
    if other.verdict == "NO":
        return f"{overrides}: does not fit ({other.high_gib:.1f} GiB)"
    slower = other.seconds / best.seconds - 1
    pace = f"{slower:+.0%} time" if abs(slower) >= 0.005 else "the same time"
    return f"{overrides}: {other.verdict}, {pace}, {other.high_gib - best.high_gib:+.1f} GiB"


def settings_table(advice: Advice, config: RunConfig) -> Table:
    room = config.cluster.hardware.memory_gib
    table = Table(title="settings that fit, fastest first", title_justify="left", box=None, pad_edge=False)
    for name in ("sharding", "checkpointing", "micro sizes", "verdict", f"GiB of {room:.1f}", "seconds a step"):
        table.add_column(name, justify="right" if name[0] in "Gs" and name != "sharding" else "left")
    for option in advice.fitting[:SHOWN]:
        table.add_row(
            option.sharding,
            "on" if option.checkpointing else "off",
            ", ".join(f"{name} {size}" for name, size in option.micro_sizes.items()),
            option.verdict,
            f"{option.high_gib:.1f}",
            ", ".join(f"{seconds:.3g}" for seconds in option.step_seconds.values()),
        )
    return table
