"""WiSE-FT (2109.01903): (1-a) theta_0 + a theta_1 on a grid, scored in and out of distribution; one is kept."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from typing import cast

from orchestrator.config.merging import InterpolateStage
from orchestrator.distributed.runtime import Runtime, start_scoring_runtime
from orchestrator.evaluation.score_tables import describe_sets, score_table, shift_labels
from orchestrator.evaluation.set_scores import Scorer, open_scorer
from orchestrator.files.atomic import write_json
from orchestrator.merging.blend import open_blend
from orchestrator.merging.curve_plot import draw_curves
from orchestrator.merging.finish_blend import Share, finish_blend
from orchestrator.merging.selection import Scores, Selection, choose_blend, inner_best
from orchestrator.metrics import phases as phase
from orchestrator.run_state.recorder import Recorder
from orchestrator.run_state.stage_context import ParentArtifact, StageContext


def run(context: StageContext) -> int:
    """Score every a, report the curves, then write and prove the chosen model."""
    stage = cast("InterpolateStage", context.stage)
    context.phases.begin(phase.LOADING)
    started = time.time()
    runtime = start_scoring_runtime(context.config, autocast=False, phases=context.phases)
    record = Recorder(context, rank=runtime.rank)
    record.event("start", world_size=runtime.world_size)
    scorer = open_scorer(context, runtime)
    shifts = shift_labels(scorer.sets)
    for line in describe_sets(scorer):
        record.log(line)
    scores = _scores_of_grid(context, runtime, scorer, record)
    chosen = choose_blend(stage, scores, shifts)
    alpha = stage.alphas[chosen.number]
    _tell(context, record, scores, shifts=shifts, chosen=chosen)
    summary = {
        "alpha": alpha,
        "why": chosen.why,
        "scores": _plain(scores[chosen.number]),
        "curves": context.folder.curves.name,
        "seconds": time.time() - started,
    }
    weights = _weights(context, alpha)
    shares = [Share(ingredient=one, weight=w) for one, w in zip(_ingredients(context), weights, strict=True)]
    return finish_blend(context, runtime, record, shares, summary=summary)


def _tell(
    context: StageContext, record: Recorder, scores: Sequence[Scores], *, shifts: Mapping[str, bool], chosen: Selection
) -> None:
    """Report the table, a summary of the curves and the choice; write curves.json and its plot."""
    stage = cast("InterpolateStage", context.stage)
    alpha = stage.alphas[chosen.number]
    columns = {f"a={a:g}": one for a, one in zip(stage.alphas, scores, strict=True)}
    for line in [*score_table(columns, shifts), *_describe_curves(stage, scores, shifts)]:
        record.log(line)
    record.log(f"chosen: a={alpha:g}, {chosen.why}")
    curves = {"alphas": list(stage.alphas), "shift": dict(shifts), "scores": [_plain(one) for one in scores]}
    write_json(context.folder.curves, {**curves, "chosen": alpha, "why": chosen.why})
    plot = context.folder.curves.with_suffix(".png")
    record.log(draw_curves(plot, stage.alphas, scores, shifts=shifts, chosen=alpha))


def _plain(scores: Scores) -> dict[str, dict[str, float | int | None]]:
    return {name: one.to_json() for name, one in scores.items()}


def _scores_of_grid(context: StageContext, runtime: Runtime, scorer: Scorer, record: Recorder) -> list[Scores]:
    stage = cast("InterpolateStage", context.stage)
    blend = open_blend(context, _ingredients(context))
    blend.model = runtime.hold(blend.model)
    scores: list[Scores] = []
    context.phases.begin(phase.SCORING, total=len(stage.alphas), unit=phase.BLENDS)
    for alpha in stage.alphas:
        began = time.time()
        blend.put(_weights(context, alpha))
        scores.append(scorer.of(blend.model))
        context.phases.advance(len(scores), unit=phase.BLENDS)
        record.log(f"a={alpha:g}: scored in {time.time() - began:.0f} s")
    del blend
    gc.collect()
    return scores


def _ingredients(context: StageContext) -> list[ParentArtifact]:
    assert context.start is not None, "the pipeline's rules ask for a policy before it"
    return [*context.other_models, context.start]


def _weights(context: StageContext, alpha: float) -> list[float]:
    """Weights of theta_0, if it is a stage's artifact (the base gets the remainder), and of theta_1."""
    return [1.0 - alpha, alpha] if context.other_models else [alpha]


def _describe_curves(stage: InterpolateStage, scores: Sequence[Scores], shifts: Mapping[str, bool]) -> list[str]:
    """For each set with accuracy, where its curve is highest."""
    lines: list[str] = []
    for name, is_shift in shifts.items():
        values = [one[name].accuracy for one in scores]
        known = [value for value in values if value is not None]
        if len(known) == len(values):
            lines.append(f"{name}{' (shift)' if is_shift else ''}: accuracy {inner_best(stage.alphas, known)}")
    return lines
