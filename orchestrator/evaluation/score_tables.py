"""Tables of scores on named sets, and shifts between sets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

from orchestrator.config.evaluation import ScoringStage
from orchestrator.evaluation.set_scores import NO_GENERAL_TEXT, OpenSet, Scorer, SetScores, standard_error


def describe_sets(scorer: Scorer) -> list[str]:
    """A line per set: rows, shift, and the source of its options."""

    def describe(one: OpenSet) -> str:
        if scorer.classes is not None:
            return f"classes {', '.join(scorer.classes.names)}" if scorer.classes.names else "a number"
        return "no options, so no accuracy" if one.choices is None else f"options {', '.join(one.choices.names)}"

    left_out = cast("ScoringStage", scorer.context.stage).forgetting and scorer.classes is not None
    return [
        *(
            f"set {one.name}: {one.count} rows, {'out of distribution' if one.shift else 'in distribution'}, {describe(one)}"
            for one in scorer.sets
        ),
        *([NO_GENERAL_TEXT] if left_out else []),
    ]


def regressions_line(base: Mapping[str, SetScores], tuned: Mapping[str, SetScores], shifts: Mapping[str, bool]) -> str:
    """A sentence naming the sets on which the tuned model is worse than the base."""
    lost: list[str] = []
    for name, before in base.items():
        after = tuned[name]
        label = f"{name} (shift)" if shifts.get(name) else name
        if before.accuracy is not None and after.accuracy is not None and after.accuracy < before.accuracy:
            error = standard_error(before.accuracy, before.rows) or 0.0
            lost.append(
                f"{label} accuracy {before.accuracy:.3f} -> {after.accuracy:.3f} (one standard error {error:.3f})"
            )
        elif after.loss > before.loss:
            was, now = math.exp(min(before.loss, 700.0)), math.exp(min(after.loss, 700.0))
            lost.append(f"{label} perplexity {was:.2f} -> {now:.2f}")
    return f"worse than the base: {'; '.join(lost)}" if lost else f"worse than the base: nothing on {len(base)} sets"


def score_table(columns: Mapping[str, Mapping[str, SetScores]], shifts: Mapping[str, bool]) -> list[str]:
    """Lines of a Markdown table: a row per set and measure, a column per model."""
    names = list(next(iter(columns.values())))
    lines = ["| set | measure | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    for name in names:
        label = f"{name} (shift)" if shifts.get(name) else name
        for measure in ("accuracy", "exact_match", "loss", "perplexity"):
            cells = [scores[name].to_json()[measure] for scores in columns.values()]
            if any(cell is not None for cell in cells):
                lines.append(f"| {label} | {measure} | " + " | ".join(_cell(cell) for cell in cells) + " |")
    return lines


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"


def shift_labels(sets: Sequence[OpenSet]) -> dict[str, bool]:
    """Shift of every set, by name."""
    return {one.name: one.shift for one in sets}
