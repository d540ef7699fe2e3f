"""Compares an earlier stage's artifact with its base: scores on sets, what was lost, rewards of generated answers."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from typing import Any, cast

import torch

from orchestrator.alignment.rewards import make_rewards
from orchestrator.config.evaluation import FIRST_SET, EvaluateStage
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.distributed.runtime import Runtime, start_scoring_runtime
from orchestrator.evaluation.classifier_scores import class_table, classifier_scores
from orchestrator.evaluation.generated_rewards import generated_rewards
from orchestrator.evaluation.score_tables import describe_sets, regressions_line, score_table, shift_labels
from orchestrator.evaluation.set_scores import NO_GENERAL_TEXT, Scorer, SetScores, open_scorer
from orchestrator.files.atomic import publish, write_json
from orchestrator.files.manifest import write_manifest
from orchestrator.metrics import phases as phase
from orchestrator.models.artifact import open_artifact
from orchestrator.models.loading import DTYPES, load_model
from orchestrator.run_state.artifact_kind import ArtifactKind
from orchestrator.run_state.recorder import Recorder
from orchestrator.run_state.stage_context import StageContext
from orchestrator.run_state.stage_result import finish


def run(context: StageContext) -> int:
    """Score base and tuned model on the same rows of every set, and report both."""
    context.phases.begin(phase.LOADING)
    started = time.time()
    runtime = start_scoring_runtime(context.config, autocast=False, phases=context.phases)
    record = Recorder(context, rank=runtime.rank)
    record.event("start", world_size=runtime.world_size)
    if context.start is not None and context.start.kind.is_classifier:
        report = _classifier_report(context, runtime, record)
        return _finish(context, record, report, report, started)
    scorer = open_scorer(context, runtime)
    for line in describe_sets(scorer):
        record.log(line)
    sets, rewards = _before_and_after(context, runtime, scorer)
    shifts = shift_labels(scorer.sets)
    scores_by_model = {name: {"loss": scores[FIRST_SET].loss, **rewards[name]} for name, scores in sets.items()}
    for name in scores_by_model["tuned"]:
        record.log(f"{name:<24} {scores_by_model['base'][name]:.4f} base, {scores_by_model['tuned'][name]:.4f} tuned")
    for line in score_table(sets, shifts):
        record.log(line)
    lost = regressions_line(sets["base"], sets["tuned"], shifts)
    record.log(lost)
    by_set = {
        name: {"shift": shifts.get(name), **{model: sets[model][name].to_json() for model in sets}}
        for name in sets["base"]
    }
    report = {"sets": by_set, "lost": lost}
    return _finish(context, record, {**scores_by_model, **report}, {"scores": scores_by_model, **report}, started)


def _classifier_report(context: StageContext, runtime: Runtime, record: Recorder) -> dict[str, Any]:
    context.phases.begin(phase.SCORING, unit=phase.ROWS)
    scores = classifier_scores(context, runtime)
    if cast("EvaluateStage", context.stage).forgetting:
        record.log(NO_GENERAL_TEXT)
    for line in class_table(scores):
        record.log(line)
    return {"sets": {name: one.to_json() for name, one in scores.items()}}


def _finish(
    context: StageContext, record: Recorder, report: Mapping[str, Any], summary: Mapping[str, Any], started: float
) -> int:
    """Write the report, and the result with its summary."""
    context.phases.begin(phase.WRITING)
    if record.is_main:
        _write(context, report)
    return finish(context, record, {**summary, "seconds": time.time() - started}, kind=ArtifactKind.REPORT)


def _before_and_after(
    context: StageContext, runtime: Runtime, scorer: Scorer
) -> tuple[dict[str, dict[str, SetScores]], dict[str, dict[str, float]]]:
    """(scores by set, rewards on the first set) of base and tuned model."""
    tuned = runtime.hold(_tuned(context))
    context.phases.begin(phase.SCORING, unit=phase.ROWS)
    sets = {"tuned": scorer.of(tuned)}
    rewards = {"tuned": _rewards(context, runtime, tuned)}
    if not context.config.tuning.is_adapter:
        runtime.release(tuned)
        del tuned
        dtype = DTYPES[context.config.model.dtype]
        base = runtime.hold(load_model(context.base_folder, context.config, weights_dtype=dtype))
        sets["base"], rewards["base"] = scorer.of(base), _rewards(context, runtime, base)
    else:
        with runtime.module_of(tuned).disable_adapter():
            sets["base"], rewards["base"] = scorer.of(tuned), _rewards(context, runtime, tuned)
    return {"base": sets["base"], "tuned": sets["tuned"]}, rewards


def _rewards(context: StageContext, runtime: Runtime, model: torch.nn.Module) -> dict[str, float]:
    stage = cast("EvaluateStage", context.stage)
    if not stage.rewards:
        return {}
    rows = PreparedRows.open(context.train_data)
    return generated_rewards(context, runtime, model, rows, make_rewards(context, runtime, stage.rewards), stage)


def _tuned(context: StageContext) -> torch.nn.Module:
    assert context.start is not None, "the pipeline's rules ask for a policy before it"
    dtype = DTYPES[context.config.model.dtype]
    return open_artifact(
        context.start.folder, base_folder=context.base_folder, config=context.config, weights_dtype=dtype
    )


def _write(context: StageContext, report: Mapping[str, Any]) -> None:
    folder = context.folder.artifact
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_json(temporary / "report.json", report)
    write_manifest(temporary, {"run": context.config.name, "stage": context.name, "kind": "evaluate"})
    publish(temporary, folder)
