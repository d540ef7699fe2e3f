"""Types, ranges and rules of studies, which are several runs of one configuration: seeds and searches.

Must not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from orchestrator.config.base import Identifier, NaturalInt, PositiveInt, Section, Text
from orchestrator.config.training import TrainingStage


class NoStudy(Section):
    """A single run."""

    kind: Literal["none"]


class WeakRule(Section):
    """All trials are trained to the same step; the best are continued, the others are stopped as weak (2002.06305, section 5)."""

    share: Annotated[float, Field(gt=0, lt=1)]
    """When the trials are compared, as a share of the steps, rounded up."""
    keep: PositiveInt
    """Trials that continue."""


class SeedsStudy(Section):
    """Every seed of new weights combined with every seed of the data order."""

    kind: Literal["seeds"]
    stage: Identifier
    """Stage whose evaluation is compared; `auto` is the last one of the pipeline that trains."""
    metric: Text
    """A column of metrics.jsonl that evaluations write, such as `eval_loss`."""
    mode: Literal["min", "max"]
    """Which way is better."""
    weights: Annotated[tuple[NaturalInt, ...], Field(min_length=1)]
    """Values of `seeds.weights`."""
    data: Annotated[tuple[NaturalInt, ...], Field(min_length=1)]
    """Values of `seeds.data`."""
    stopping: WeakRule | None
    """Which trials are stopped early; null trains all to the end."""


class MedianRule(Section):
    """A trial whose best value so far is worse than the median of the others at the same step is stopped as weak."""

    startup_trials: PositiveInt
    """Finished trials before any is stopped."""
    after_step: NaturalInt
    """No trial is stopped at or before this step."""


class SearchStudy(Section):
    """Optuna chooses the values of each trial from the results of earlier ones."""

    kind: Literal["optuna"]
    stage: Identifier
    """Stage whose evaluation is compared; `auto` is the last one of the pipeline that trains."""
    metric: Text
    """A column of metrics.jsonl that evaluations write, such as `eval_loss`."""
    mode: Literal["min", "max"]
    """Which way is better."""
    num_trials: PositiveInt
    """Total number of trials; a larger number continues the search."""
    sampler: Literal["tpe", "random"]
    """`tpe` models good and bad values separately (Bergstra et al. 2011); `random` ignores results."""
    startup_trials: PositiveInt
    """Trials with random values before tpe models them."""
    seed: NaturalInt
    """Seed of the sampler: the same seed and results give the same values, even after interruptions."""
    pruning: MedianRule | None
    """Which trials are stopped early; null trains all to the end."""
    max_failures: NaturalInt
    """Failed trials that are recorded and skipped; one more ends the search."""


Study = NoStudy | SeedsStudy | SearchStudy


def study_problems(study: Study, stages: Mapping[str, TrainingStage], *, launcher: str) -> list[str]:
    """One sentence for every broken rule of a study; `stages` are those of the pipeline that train."""
    if isinstance(study, NoStudy):
        return []
    name = judged_stage(study, stages)
    if name is None:
        there = ", ".join(stages) or "none"
        return [f"study.stage: {study.stage} trains nothing in this pipeline; the stages that train are {there}"]
    problems = _seeds_problems(study) if isinstance(study, SeedsStudy) else []
    stage = stages[name]
    if stage.data.eval.path == "none":
        problems.append(f"study: there are no held-out rows to judge trials by; type stages.{name}.data.eval.path=auto")
    if isinstance(study, SearchStudy) and study.pruning is not None and stage.evaluate_every_steps is None:
        problems.append(
            "study.pruning: it needs evaluations during training, and there are none; type "
            f"stages.{name}.evaluate_every_steps=50 or study.pruning=null"
        )
    if launcher == "slurm" and isinstance(study, SearchStudy):
        problems.append(
            "study=optuna: each trial waits for the result of the one before it, and a job of Slurm is only submitted; type "
            "launcher=torchrun inside an allocation"
        )
    if launcher == "slurm" and isinstance(study, SeedsStudy) and study.stopping is not None:
        problems.append(
            "study.stopping: the trials are judged together half-way, and jobs of Slurm are only submitted; type "
            "study.stopping=null, or launcher=torchrun inside an allocation"
        )
    return problems


def judged_stage(study: SeedsStudy | SearchStudy, stages: Mapping[str, TrainingStage]) -> str | None:
    """Name of the stage whose evaluation is compared; None if the pipeline trains no such stage."""
    if study.stage == "auto":
        return list(stages)[-1] if stages else None
    return study.stage if study.stage in stages else None


def pause_problems(stages: Mapping[str, TrainingStage], *, launcher: str) -> list[str]:
    """Reasons why a stage cannot pause."""
    problems: list[str] = []
    for name, stage in stages.items():
        pause, every = stage.pause_at_step, stage.evaluate_every_steps
        if pause is not None and launcher == "slurm":
            problems.append(
                f"stages.{name}.pause_at_step: a job of Slurm that saved and ended is queued again by itself; type "
                f"stages.{name}.pause_at_step=null"
            )
        if pause is not None and stage.early_stopping is not None and every is not None and pause % every:
            problems.append(
                f"stages.{name}.pause_at_step: the stage is evaluated at the pause, and early stopping would count it; {pause} "
                f"is not a multiple of evaluate_every_steps = {every}"
            )
    return problems


def _seeds_problems(study: SeedsStudy) -> list[str]:
    lists = {"weights": study.weights, "data": study.data}
    problems = [
        f"study.{key}: a seed appears twice in {list(seeds)}"
        for key, seeds in lists.items()
        if len(set(seeds)) < len(seeds)
    ]
    trials = len(study.weights) * len(study.data)
    if study.stopping is not None and study.stopping.keep >= trials:
        problems.append(
            f"study.stopping.keep: {study.stopping.keep} of {len(study.weights)} x {len(study.data)} = {trials} trials stops none; "
            f"give less than {trials}, or type study.stopping=null"
        )
    return problems
