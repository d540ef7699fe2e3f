"""The graph of a pipeline: which stage starts from which artifact. Must not import torch."""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.config.rollout import STAGE_PREFIX
from orchestrator.config.run import RunConfig, Stage, kinds_that_make, made_kind
from orchestrator.config.stage import Product
from orchestrator.config.tuning import LoraTuning


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
    rewards = [reward.source for reward in stage.reward_sources]
    scored = [reward.removeprefix(STAGE_PREFIX) for reward in rewards if reward.startswith(STAGE_PREFIX)]
    return tuple(dict.fromkeys([*start, *stage.blended_stages, *scored]))


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


def start_kinds(stage: Stage) -> tuple[str, ...]:
    """The kinds of stages that `start_from` may name."""
    return _kinds(stage.starts_from)


def _auto_kinds(stage: Stage) -> tuple[str, ...]:
    """The kinds of stages that `start_from: auto` looks for."""
    return _kinds(stage.auto_starts_from or stage.starts_from)


def _kinds(products: Iterable[Product]) -> tuple[str, ...]:
    return tuple(kind for product in products for kind in kinds_that_make(product))


def grows_rank(config: RunConfig, name: str) -> bool:
    """Whether a stage yields an adapter of a higher rank than `tuning.rank`: ranks add up when low-rank products are
    summed.
    """
    return config.stages[name].adds_up_ranks and isinstance(config.for_stage(name).tuning, LoraTuning)
