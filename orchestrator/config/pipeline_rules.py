"""Rules for the graph of a pipeline. Must not import torch."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.config.alignment import PolicyStage, RewardStage
from orchestrator.config.classification import CLASSIFIER_KINDS, ClassifyStage, SelfTrainingStage
from orchestrator.config.evaluation import EvaluateStage, ScoringStage
from orchestrator.config.merging import InterpolateStage, MergeStage, SoupStage
from orchestrator.config.pipeline import (
    MODEL_PREFIX,
    blended_stages,
    grows_rank,
    inputs_of,
    resolve_starts,
    rewards_of,
    start_kinds,
)
from orchestrator.config.run import PARENT, POLICY_KINDS, STAGE_PREFIX, RunConfig, made_kind, makes_classifier
from orchestrator.config.training import TrainingStage
from orchestrator.rewards.extensions import CALLBACK, METRIC
from orchestrator.rewards.load import problems_of
from orchestrator.rewards.python_file import file_problems

THE_TOKENIZERS = "the tokenizer's own"


def pipeline_problems(config: RunConfig) -> list[str]:
    """Problems of the graph, one sentence each; the stages' own settings are checked elsewhere."""
    resolved = resolve_starts(config)
    return [problem for name in config.pipeline if name in config.stages for problem in _stage_problems(resolved, name)]


def _stage_problems(config: RunConfig, name: str) -> Iterator[str]:
    before = config.pipeline[: config.pipeline.index(name)]
    stage = config.stages[name]
    start = stage.start_from
    if start not in (None, "auto", PARENT):
        yield from _input_problems(config, f"stages.{name}.start_from", start, before, start_kinds(stage))
    if isinstance(stage, SelfTrainingStage) and start in (None, "auto"):
        yield f"stages.{name}.start_from: it continues from a classifier; add one before it, such as stage=classify on weak labels"
    for source in inputs_of(config, name):
        if source in before and source in config.stages:
            yield from _template_problems(config, name, source)
    if isinstance(stage, EvaluateStage | InterpolateStage | MergeStage) and start in (None, "auto"):
        what = "makes a policy" if isinstance(stage, MergeStage) else "makes a policy or a classifier"
        if any(made_kind(config, one) in start_kinds(stage) for one in before if one in config.stages):
            yield f"stages.{name}.start_from: null; it must be a stage before {name} that {what}, or auto, the nearest one"
        else:
            yield f"stages.{name}.start_from: no stage before {name} {what}; add one to the pipeline, such as sft"
    yield from _blend_problems(config, name, before)
    if (
        isinstance(stage, ScoringStage)
        and start in before
        and start in config.stages
        and makes_classifier(config, start)
    ):
        yield from _scored_classifier_problems(config, name)
    yield from _reward_problems(config, name, before)
    if isinstance(stage, TrainingStage):
        yield from _function_problems(name, stage)


def _reward_problems(config: RunConfig, name: str, before: tuple[str, ...]) -> Iterator[str]:
    """What is wrong with the rewards of a stage: none, a stage that is no reward model before it, or a faulty function."""
    if isinstance(stage := config.stages[name], PolicyStage) and not stage.rewards:
        yield f"stages.{name}.rewards: there is none; add for example {{source: exact_match, weight: 1.0, options: {{}}}}"
    for number, reward in enumerate(rewards_of(config, name)):
        field = f"stages.{name}.rewards.{number}"
        if reward.source.startswith(STAGE_PREFIX):
            wanted = reward.source.removeprefix(STAGE_PREFIX)
            yield from _input_problems(config, f"{field}.source", wanted, before, ("reward",))
        elif not reward.source.startswith(MODEL_PREFIX):
            yield from (f"{field}: {problem}" for problem in problems_of(reward.source, reward.options))


def _function_problems(name: str, stage: TrainingStage) -> Iterator[str]:
    """Problems of the user's own metrics and callbacks; their files are parsed, not executed."""
    metrics = stage.metrics.functions
    for form, key, functions in ((METRIC, "metrics.functions", metrics), (CALLBACK, "callbacks", stage.callbacks)):
        for number, function in enumerate(functions):
            problems = file_problems(function.source, function.options, form)
            yield from (f"stages.{name}.{key}.{number}: {problem}" for problem in problems)
    if metrics and isinstance(stage, RewardStage):
        yield f"stages.{name}.metrics.functions: a reward model generates nothing that they could measure; remove them"
    elif metrics and stage.data.eval.path == "none":
        yield f"stages.{name}.metrics.functions: nothing is held out to measure; leave out stages.{name}.data.eval.path=none"


def _blend_problems(config: RunConfig, name: str, before: tuple[str, ...]) -> Iterator[str]:
    """Problems of a soup's ingredients: not an earlier stage, too few, or not trainable; their tunings are in
    `rules.py`.
    """
    stage, field = config.stages[name], f"stages.{name}"
    of_classifiers = isinstance(stage, InterpolateStage) and makes_classifier(config, name)
    for other in blended_stages(stage):
        key = "members" if isinstance(stage, SoupStage) else "origin"
        kinds = CLASSIFIER_KINDS if of_classifiers else POLICY_KINDS
        yield from _input_problems(config, f"{field}.{key}", other, before, kinds)
    if isinstance(stage, SoupStage):
        first = () if stage.start_from is None else (STAGE_PREFIX + stage.start_from,)
        ingredients = (*first, *stage.members)
        if len(set(ingredients)) < max(2, len(ingredients)):
            yield (
                f"{field}.members: a soup needs two or more different ingredients, these are {', '.join(ingredients) or 'none'}; "
                "type stage:NAME or the folder of a finished run"
            )
    start = stage.start_from
    if isinstance(stage, TrainingStage) and start in before and start in config.stages and grows_rank(config, start):
        yield (
            f"{field}.start_from: {start} makes an adapter whose rank is the sum of its ingredients', which tuning.rank does not "
            "train; start from one of them, or blend full models"
        )


def _scored_classifier_problems(config: RunConfig, name: str) -> Iterator[str]:
    """Problems of a stage that asks a classifier for what it cannot do."""
    stage = config.stages[name]
    assert isinstance(stage, ScoringStage)
    asked = ["exact_match"] if stage.exact_match else []
    asked += ["rewards"] if isinstance(stage, EvaluateStage) and stage.rewards else []
    yield from (
        f"stages.{name}.{key}: {stage.start_from} is a classifier, which generates no answer; remove it"
        for key in asked
    )
    given = {"options": stage.options} | {f"sets.{key}.options": entry.options for key, entry in stage.sets.items()}
    yield from (
        f"stages.{name}.{key}: {stage.start_from} is a classifier, whose options are its classes; type auto"
        for key, options in given.items()
        if options != "auto"
    )
    if isinstance(stage, InterpolateStage):
        yield from _classifier_blend_problems(config, name, stage)


def _classifier_blend_problems(config: RunConfig, name: str, stage: InterpolateStage) -> Iterator[str]:
    tuning, learnt = config.for_stage(name).tuning, config.stages[str(stage.start_from)]
    if isinstance(learnt, ClassifyStage) and learnt.problem == "regression" and stage.choose_by == "accuracy":
        yield f"stages.{name}.choose_by: {stage.start_from} predicts a number, which has no accuracy; type loss"
    if stage.origin is None:
        yield (
            f"stages.{name}.origin: null is the base, which has no head for the classes of {stage.start_from}; name an earlier classifier, "
            "such as a stage that trains the head alone (tuning: freeze with layers: none)"
        )
    if tuning.is_adapter:
        yield (
            f"stages.{name}: classifiers are interpolated as whole models, and {stage.start_from} is tuned by {tuning.method}; type "
            "tuning=full or tuning=freeze"
        )


def _template_problems(config: RunConfig, name: str, source: str) -> Iterator[str]:
    ours, theirs = config.stages[name].data.chat_template, config.stages[source].data.chat_template
    if ours != theirs:
        yield (
            f"stages.{name}.data.chat_template: {ours or THE_TOKENIZERS}, but it reads {source}, which uses "
            f"{theirs or THE_TOKENIZERS}; give both the same"
        )


def _input_problems(
    config: RunConfig, field: str, wanted: str | None, before: tuple[str, ...], kinds: tuple[str, ...]
) -> Iterator[str]:
    fitting = [name for name in before if name in config.stages and made_kind(config, name) in kinds]
    if wanted not in fitting:
        there = f"there are {', '.join(fitting)}" if fitting else "there is none in the pipeline"
        if wanted in before and wanted in config.stages and made_kind(config, wanted) != config.stages[wanted].kind:
            there = f"it makes a classifier; {there}"
        yield f"{field}: {wanted} is not a stage of kind {' or '.join(kinds)} before this one; {there}"
