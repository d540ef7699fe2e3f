"""Which blend of models is kept, by its scores on the selection sets. Pure; knows no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.config.merging import InterpolateStage, SelectionStage
from orchestrator.errors import DataError
from orchestrator.evaluation.set_scores import SetScores

Scores = Mapping[str, SetScores]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The chosen blend, by index, and the reason."""

    number: int
    why: str


def choose_blend(stage: InterpolateStage, scores: Sequence[Scores], shifts: Mapping[str, bool]) -> Selection:
    """The index in `alphas` that the stage's rule keeps; ties: the better on the other sets, then the larger a.

    DataError if a selection set has no accuracy.
    """
    inside = [selection_score(stage, one, _kind(stage, shifts, shift=False)) for one in scores]
    outside = [selection_score(stage, one, _kind(stage, shifts, shift=True)) for one in scores]
    numbers = range(len(scores))
    sentence = f"mean {stage.choose_by} on {', '.join(stage.choose_on)}"
    match stage.choose:
        case "best_id":
            best = max(numbers, key=lambda i: (inside[i], outside[i], stage.alphas[i]))
            return Selection(number=best, why=f"best in distribution ({sentence})")
        case "best_ood":
            best = max(numbers, key=lambda i: (outside[i], inside[i], stage.alphas[i]))
            return Selection(number=best, why=f"best out of distribution ({sentence})")
        case "id_within":
            allowed = [i for i in numbers if inside[i] >= max(inside) - stage.within - 1e-12]
            best = max(allowed, key=lambda i: (outside[i], inside[i], stage.alphas[i]))
            why = f"best out of distribution of the {len(allowed)} that lose at most {stage.within:g} in distribution ({sentence})"
            return Selection(number=best, why=why)


def greedy_members(
    stage: SelectionStage, alone: Sequence[Scores], score: Callable[[Sequence[int]], Scores]
) -> list[int]:
    """Recipe 1 of 2203.05482: from the best ingredient on, each one is kept if the average does not get worse.

    `score` returns the scores of the average of some ingredients, given by index.
    """
    values = [selection_score(stage, one, stage.choose_on) for one in alone]
    order = sorted(range(len(alone)), key=lambda i: -values[i])
    kept, best = [order[0]], values[order[0]]
    for candidate in order[1:]:
        value = selection_score(stage, score([*kept, candidate]), stage.choose_on)
        if value >= best:
            kept, best = [*kept, candidate], value
    return kept


def selection_score(stage: SelectionStage, scores: Scores, names: Sequence[str]) -> float:
    """Mean accuracy, or negative mean loss, over sets; 0 over none."""
    if not names:
        return 0.0
    if stage.choose_by == "loss":
        return -sum(scores[name].loss for name in names) / len(names)
    shares = {name: scores[name].accuracy for name in names}
    missing = [name for name, share in shares.items() if share is None]
    if missing:
        raise DataError(
            f"choose_by=accuracy: {', '.join(missing)} has no accuracy, because it has no options; give its options (a list), or type "
            "choose_by=loss"
        )
    return sum(share for share in shares.values() if share is not None) / len(names)


def _kind(stage: SelectionStage, shifts: Mapping[str, bool], *, shift: bool) -> list[str]:
    return [name for name in stage.choose_on if shifts[name] == shift]


def inner_best(alphas: Sequence[float], values: Sequence[float]) -> str:
    """A sentence on where a curve is highest, and by how much it exceeds its ends."""
    best = max(range(len(values)), key=lambda i: values[i])
    first, last = min(range(len(alphas)), key=alphas.__getitem__), max(range(len(alphas)), key=alphas.__getitem__)
    where = f"highest at a={alphas[best]:g} ({values[best]:.3f}); the endpoints have {values[first]:.3f} and {values[last]:.3f}"
    passes = values[best] - max(values[first], values[last])
    return f"{where}: inside by {passes:.3f}" if passes > 0 else where
