"""Model soups (2203.05482): the average of several fine-tuned models of one base, compared with its members."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from orchestrator.config.merging import SoupStage
from orchestrator.config.rollout import STAGE_PREFIX
from orchestrator.distributed.runtime import start_scoring_runtime
from orchestrator.evaluation.score_tables import describe_sets, regressions_line, score_table, shift_labels
from orchestrator.evaluation.set_scores import Scorer, open_scorer
from orchestrator.files.atomic import write_json
from orchestrator.merging.blend import Blend, open_blend
from orchestrator.merging.finish_blend import Share, finish_blend
from orchestrator.merging.selection import Scores, greedy_members
from orchestrator.metrics import phases as phase
from orchestrator.run_state.recorder import Recorder
from orchestrator.run_state.stage_context import ParentArtifact, StageContext


def run(context: StageContext) -> int:
    """Score base and ingredients, average them by the stage's recipe, then write and prove the soup."""
    context.phases.begin(phase.LOADING)
    started = time.time()
    runtime = start_scoring_runtime(context.config, autocast=False, phases=context.phases)
    record = Recorder(context, rank=runtime.rank)
    record.event("start", world_size=runtime.world_size)
    scorer = open_scorer(context, runtime)
    shifts = shift_labels(scorer.sets)
    for line in describe_sets(scorer):
        record.log(line)
    ingredients = ingredients_of(context)
    blend = open_blend(context, ingredients)
    blend.model = runtime.hold(blend.model)
    context.phases.begin(phase.SCORING, unit=phase.ROWS)
    columns, kept = _cooked(cast("SoupStage", context.stage), scorer, blend, ingredients)
    del blend
    gc.collect()
    names = [ingredients[number].stage for number in kept]
    for line in score_table(columns, shifts):
        record.log(line)
    record.log(f"the soup: {', '.join(names)}, each with weight 1/{len(kept)}")
    record.log(regressions_line(columns["base"], columns["soup"], shifts))
    curves = {
        "members": names,
        "shift": shifts,
        "scores": {name: {key: one.to_json() for key, one in by_set.items()} for name, by_set in columns.items()},
    }
    write_json(context.folder.curves, curves)
    summary = {"members": names, "scores": curves["scores"]["soup"], "curves": context.folder.curves.name}
    shares = [
        Share(ingredient=one, weight=1 / len(kept) if number in kept else 0.0) for number, one in enumerate(ingredients)
    ]
    return finish_blend(context, runtime, record, shares, summary={**summary, "seconds": time.time() - started})


def ingredients_of(context: StageContext) -> list[ParentArtifact]:
    """The artifact that the stage starts from, if any, and its members, each named as in `members`."""
    found = [*([] if context.start is None else [context.start]), *context.other_models]
    return [one if one.stage.startswith("/") else replace(one, stage=STAGE_PREFIX + one.stage) for one in found]


def _cooked(
    stage: SoupStage, scorer: Scorer, blend: Blend, ingredients: Sequence[ParentArtifact]
) -> tuple[dict[str, Scores], list[int]]:
    """(scores of base, ingredients and soup by name, indices of the ingredients in the soup)."""

    def average(numbers: Sequence[int]) -> Scores:
        blend.put([1 / len(numbers) if number in numbers else 0.0 for number in range(len(ingredients))])
        return scorer.of(blend.model)

    blend.put([0.0] * len(ingredients))
    base = scorer.of(blend.model)
    alone = [average([number]) for number in range(len(ingredients))]
    kept = list(range(len(ingredients))) if stage.recipe == "uniform" else greedy_members(stage, alone, average)
    named = {one.stage: scores for one, scores in zip(ingredients, alone, strict=True)}
    return {"base": base, **named, "soup": average(kept)}, kept
