"""Rules for the graph of a pipeline. Must not import torch."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.config.evaluation import ScoringStage
from orchestrator.config.merging import InterpolateStage
from orchestrator.config.pipeline import grows_rank, inputs_of, resolve_starts, start_kinds
from orchestrator.config.rollout import MODEL_PREFIX, STAGE_PREFIX
from orchestrator.config.run import (
    CLASSIFIER_KINDS,
    PARENT,
    POLICY_KINDS,
    RunConfig,
    Stage,
    kinds_that_make,
    made_kind,
    makes_classifier,
)
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
    for source in inputs_of(config, name):
        if source in before and source in config.stages:
            yield from _template_problems(config, name, source)
    if stage.needs_start and start in (None, "auto"):
        yield _start_problem(config, name, before)
    yield from _blend_problems(config, name, before)
    if isinstance(stage, ScoringStage) and start in before and start in config.stages:
        yield from _scored_classifier_problems(config, name, stage, start)
    yield from _reward_problems(config, name, before)
    yield from _function_problems(name, stage)


def _start_problem(config: RunConfig, name: str, before: tuple[str, ...]) -> str:
    """What to do about a missing start: name one of the stages before, or add one."""
    stage = config.stages[name]
    what = f"makes {' or '.join(f'a {product}' for product in stage.starts_from)}"
    if any(made_kind(config, one) in start_kinds(stage) for one in before if one in config.stages):
        return f"stages.{name}.start_from: null; it must be a stage before {name} that {what}, or auto, the nearest one"
    example = kinds_that_make(stage.starts_from[0])[0]
    return f"stages.{name}.start_from: no stage before {name} {what}; add one to the pipeline, such as {example}"


def _reward_problems(config: RunConfig, name: str, before: tuple[str, ...]) -> Iterator[str]:
    """What is wrong with the rewards of a stage: no reward model of that name before it, or a faulty function."""
    for number, reward in enumerate(config.stages[name].reward_sources):
        field = f"stages.{name}.rewards.{number}"
        if reward.source.startswith(STAGE_PREFIX):
            wanted = reward.source.removeprefix(STAGE_PREFIX)
            yield from _input_problems(config, f"{field}.source", wanted, before, ("reward",))
        elif not reward.source.startswith(MODEL_PREFIX):
            yield from (f"{field}: {problem}" for problem in problems_of(reward.source, reward.options))


FORMS = {"metrics.functions": METRIC, "callbacks": CALLBACK}
"""The key of a user's own functions within a stage -> how they are called."""


def _function_problems(name: str, stage: Stage) -> Iterator[str]:
    """Problems of the user's own metrics and callbacks; their files are parsed, not executed."""
    for key, functions in stage.user_functions.items():
        for number, function in enumerate(functions):
            problems = file_problems(function.source, function.options, FORMS[key])
            yield from (f"stages.{name}.{key}.{number}: {problem}" for problem in problems)
    metrics = stage.user_functions.get("metrics.functions")
    if metrics and stage.makes == "reward model":
        yield f"stages.{name}.metrics.functions: a reward model generates nothing that they could measure; remove them"
    elif metrics and stage.data.eval.path == "none":
        yield f"stages.{name}.metrics.functions: nothing is held out to measure; leave out stages.{name}.data.eval.path=none"


def _blend_problems(config: RunConfig, name: str, before: tuple[str, ...]) -> Iterator[str]:
    """Problems of a blend's ingredients that are no earlier stage, or cannot be trained on; their tunings are in
    `rules.py`.
    """
    stage, field = config.stages[name], f"stages.{name}"
    kinds = CLASSIFIER_KINDS if makes_classifier(config, name) else POLICY_KINDS
    for other in stage.blended_stages:
        yield from _input_problems(config, f"{field}.{stage.blend_key}", other, before, kinds)
    start = stage.start_from
    if stage.trains and start in before and start in config.stages and grows_rank(config, start):
        yield (
            f"{field}.start_from: {start} makes an adapter whose rank is the sum of its ingredients', which tuning.rank does not "
            "train; start from one of them, or blend full models"
        )


def _scored_classifier_problems(config: RunConfig, name: str, stage: ScoringStage, start: str) -> Iterator[str]:
    """Problems of a stage that asks the classifier it starts from, if that is one, for what it cannot do."""
    if not makes_classifier(config, start):
        return
    yield from stage.classifier_problems(name)
    if not isinstance(stage, InterpolateStage):
        return
    tuning = config.for_stage(name).tuning
    if config.stages[start].predicts_numbers and stage.choose_by == "accuracy":
        yield f"stages.{name}.choose_by: {start} predicts a number, which has no accuracy; type loss"
    if stage.origin is None:
        yield (
            f"stages.{name}.origin: null is the base, which has no head for the classes of {start}; name an earlier classifier, "
            "such as a stage that trains the head alone (tuning: freeze with layers: none)"
        )
    if tuning.is_adapter:
        yield (
            f"stages.{name}: classifiers are interpolated as whole models, and {start} is tuned by {tuning.method}; type "
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
