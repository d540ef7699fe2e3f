"""The graph of a pipeline: which stage starts from which artifact. Must not import torch."""

from __future__ import annotations

from orchestrator.config.alignment import PolicyStage, RewardSource
from orchestrator.config.classification import CLASSIFIER_KINDS, ClassifyStage, SelfTrainingStage
from orchestrator.config.evaluation import EvaluateStage
from orchestrator.config.merging import InterpolateStage, SoupStage
from orchestrator.config.run import POLICY_KINDS, STAGE_PREFIX, RunConfig, Stage, made_kind
from orchestrator.config.tuning import LoraTuning

MODEL_PREFIX = "model:"


def resolve_starts(config: RunConfig) -> RunConfig:
    """The configuration with every `start_from: auto` replaced by the name of a stage (or null).

    Resolved in pipeline order: the artifact of an interpolation follows from its starting point.
    """
    for name in dict.fromkeys([*config.pipeline, *config.stages]):
        stage = config.stages.get(name)
        if stage is not None and stage.start_from == "auto":
            start = stage.model_copy(update={"start_from": _nearest(config, name, _auto_kinds(stage))})
            config = config.model_copy(update={"stages": {**config.stages, name: start}})
    return config


def inputs_of(config: RunConfig, name: str) -> tuple[str, ...]:
    """The stages whose artifacts a stage of a resolved configuration reads."""
    stage = config.stages[name]
    start = [stage.start_from] if stage.start_from is not None else []
    rewards = [source.source for source in rewards_of(config, name)]
    scored = [reward.removeprefix(STAGE_PREFIX) for reward in rewards if reward.startswith(STAGE_PREFIX)]
    return tuple(dict.fromkeys([*start, *blended_stages(stage), *scored]))


def rewards_of(config: RunConfig, name: str) -> tuple[RewardSource, ...]:
    """The rewards that score completions in a stage."""
    stage = config.stages[name]
    return stage.rewards if isinstance(stage, PolicyStage | EvaluateStage) else ()


def descendants(config: RunConfig, changed: set[str]) -> tuple[str, ...]:
    """The changed stages and all that depend on them, in pipeline order."""
    found: list[str] = []
    for name in config.pipeline:
        if name in changed or any(source in found for source in inputs_of(config, name)):
            found.append(name)
    return tuple(found)


def _nearest(config: RunConfig, name: str, kinds: tuple[str, ...]) -> str | None:
    if name not in config.pipeline:
        return None
    before = config.pipeline[: config.pipeline.index(name)]
    makers = [earlier for earlier in before if earlier in config.stages and made_kind(config, earlier) in kinds]
    return makers[-1] if makers else None


def _auto_kinds(stage: Stage) -> tuple[str, ...]:
    """The artifacts that `start_from: auto` looks for."""
    if isinstance(stage, EvaluateStage | InterpolateStage):
        return (*POLICY_KINDS, *CLASSIFIER_KINDS)
    return CLASSIFIER_KINDS if isinstance(stage, SelfTrainingStage) else POLICY_KINDS


def start_kinds(stage: Stage) -> tuple[str, ...]:
    """The artifacts that `start_from` may name."""
    return (*POLICY_KINDS, *CLASSIFIER_KINDS) if isinstance(stage, ClassifyStage) else _auto_kinds(stage)


def blended_stages(stage: Stage) -> tuple[str, ...]:
    """Stages of the same run whose artifacts are blended with that of `start_from`."""
    if isinstance(stage, InterpolateStage):
        return () if stage.origin is None else (stage.origin,)
    if isinstance(stage, SoupStage):
        return tuple(member.removeprefix(STAGE_PREFIX) for member in stage.members if member.startswith(STAGE_PREFIX))
    return ()


def external_members(stage: Stage) -> tuple[str, ...]:
    """Members of a soup that come from other runs."""
    if not isinstance(stage, SoupStage):
        return ()
    return tuple(member for member in stage.members if not member.startswith(STAGE_PREFIX))


def grows_rank(config: RunConfig, name: str) -> bool:
    """Whether a stage yields an adapter of a higher rank than `tuning.rank`: ranks add up when low-rank products are
    summed.
    """
    stage = config.stages[name]
    if not isinstance(config.for_stage(name).tuning, LoraTuning):
        return False
    return isinstance(stage, SoupStage) or (isinstance(stage, InterpolateStage) and stage.origin is not None)
