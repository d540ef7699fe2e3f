"""Rules across several keys of one stage. Must not import torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from orchestrator.config.alignment import DpoStage, PolicyStage
from orchestrator.config.classification import ClassifyStage, SelfTrainingStage, classification_problems
from orchestrator.config.evaluation import FIRST_SET, FORGETTING, ScoringStage, shifts_of
from orchestrator.config.merging import InterpolateStage, MergeStage, SelectionStage, SoupStage
from orchestrator.config.run import RunConfig, Stage, tunings_of
from orchestrator.config.tuning import WHOLE_MODEL_TUNINGS, LoraTuning


def stage_problems(config: RunConfig, name: str, stage: Stage) -> list[str]:
    """Problems of a stage of preference or policy optimisation, or of a stage that trains nothing."""
    field = f"stages.{name}"
    problems: list[str] = []
    if isinstance(stage, ClassifyStage | SelfTrainingStage):
        problems += classification_problems(field, stage)
    if isinstance(stage, DpoStage) and stage.label_smoothing and stage.loss != "dpo":
        problems.append(f"{field}.label_smoothing: only loss=dpo has it, not {stage.loss}; set it to 0")
    if isinstance(stage, PolicyStage):
        completions = stage.rollout.prompts * stage.rollout.group_size
        if completions % stage.batch.global_size:
            problems.append(
                f"{field}.rollout: prompts x group_size = {stage.rollout.prompts} x {stage.rollout.group_size} = {completions} "
                f"completions is not a multiple of batch.global_size = {stage.batch.global_size}"
            )
        if stage.rollout.group_size < 2:
            problems.append(
                f"{field}.rollout.group_size: advantages compare completions of one prompt; at least 2, not 1"
            )
        if stage.rollout.prompts % config.world_size:
            problems.append(
                f"{field}.rollout.prompts: {stage.rollout.prompts} prompts cannot be shared by {config.world_size} ranks evenly"
            )
        if stage.data.packing != "none":
            problems.append(f"{field}.data.packing: prompts are not packed; set packing=none, not {stage.data.packing}")
    if isinstance(stage, ScoringStage):
        problems += scoring_problems(field, stage)
    tunings = list(tunings_of(config).values()) or [config.tuning]
    if isinstance(stage, SelectionStage) and isinstance(tunings[-1], LoraTuning) and tunings[-1].use_dora:
        problems.append(
            f"{field}: with tuning.use_dora=true the weights are not the sum of base and product, so a blend of adapters is not "
            "a blend of models; set tuning.use_dora=false, or tune whole models"
        )
    if isinstance(stage, MergeStage) and isinstance(tunings[-1], WHOLE_MODEL_TUNINGS):
        problems.append(
            f"{field}: tuning={tunings[-1].method} leaves no adapter to merge; remove {name} from the pipeline"
        )
    return problems


def scoring_problems(field: str, stage: ScoringStage) -> list[str]:
    """Problems of the sets of a stage (`field` is its key) and of the selection made by them."""
    problems = [
        f"{field}.sets.{name}: this name is taken (data is data.train); give the set another one"
        for name in stage.sets
        if name in (FIRST_SET, FORGETTING)
    ]
    if stage.data.packing != "none":
        problems.append(f"{field}.data.packing: rows are scored one by one; set packing=none, not {stage.data.packing}")
    if not isinstance(stage, SelectionStage):
        return problems
    shifts = shifts_of(stage)
    unknown = [name for name in stage.choose_on if name not in shifts]
    if unknown:
        problems.append(f"{field}.choose_on: {', '.join(unknown)}: no such set; there are {', '.join(shifts)}")
    return problems + [f"{field}.choose_on: {what}" for what in _choice_problems(stage, shifts)]


def _choice_problems(stage: SelectionStage, shifts: Mapping[str, bool]) -> Iterator[str]:
    """Problems of a selection that needs sets and does not name them."""
    kinds = {shifts[name] for name in stage.choose_on if name in shifts}
    there = ", ".join(f"{name} ({'shift' if is_shift else 'no shift'})" for name, is_shift in shifts.items())
    if isinstance(stage, SoupStage) and stage.recipe == "greedy" and not kinds:
        yield f"recipe=greedy uses held-out scores; name the sets for it, none of them a test set (there are {there})"
    if isinstance(stage, InterpolateStage):
        needs = {"best_ood": {True}, "best_id": {False}, "id_within": {True, False}}[stage.choose]
        for is_shift in sorted(needs - kinds):
            what = "with shift=true" if is_shift else "without shift"
            yield f"choose={stage.choose} needs a set {what}; name one (there are {there}), and no test set"
