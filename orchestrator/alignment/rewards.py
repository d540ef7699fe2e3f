"""Rewards of completions: reward models, built-in and user functions, weighted and listed by name. Knows no loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from orchestrator.config.rollout import MODEL_PREFIX, STAGE_PREFIX, RewardSource
from orchestrator.data.encoding.tokenizer import load_facts
from orchestrator.dataloader.batch import batch_of
from orchestrator.distributed.runtime import Runtime
from orchestrator.errors import ConfigError
from orchestrator.generation.samples import Scored
from orchestrator.models.artifact import open_artifact
from orchestrator.models.loading import DTYPES, load_scorer
from orchestrator.rewards.load import load_reward
from orchestrator.run_state.stage_context import StageContext
from orchestrator.training.objectives import document_scores

Score = Callable[[Sequence[Scored]], list[float]]


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """Every reward of a stage with its name and weight."""

    scores: Mapping[str, Score]
    weights: Mapping[str, float]

    def of(self, completions: Sequence[Scored]) -> tuple[list[float], dict[str, list[float]]]:
        """(weighted sums, each reward separately) of these completions."""
        apart = {name: score(completions) for name, score in self.scores.items()}
        sums = [sum(self.weights[name] * values[i] for name, values in apart.items()) for i in range(len(completions))]
        return sums, apart


def make_rewards(context: StageContext, runtime: Runtime, sources: Sequence[RewardSource]) -> Rewards:
    """Load every model and function. ConfigError if one cannot be used."""
    names = _names(sources)
    scores = {name: _score(context, runtime, source) for name, source in zip(names, sources, strict=True)}
    return Rewards(scores=scores, weights={name: s.weight for name, s in zip(names, sources, strict=True)})


def _names(sources: Sequence[RewardSource]) -> list[str]:
    """A short name for each, numbered where two would be equal."""
    short = [source.source.rsplit(":", 1)[-1].rsplit("/", 1)[-1] for source in sources]
    return [name if short.count(name) == 1 else f"{name}_{number}" for number, name in enumerate(short)]


def _score(context: StageContext, runtime: Runtime, source: RewardSource) -> Score:
    if source.source.startswith(STAGE_PREFIX):
        folder = context.rewards[source.source.removeprefix(STAGE_PREFIX)]
        return _by_model(runtime, _open_trained(context, runtime, folder))
    if source.source.startswith(MODEL_PREFIX):
        folder = Path(source.source.removeprefix(MODEL_PREFIX)).expanduser()
        return _by_model(runtime, _open_folder(context, runtime, folder))
    function = load_reward(source.source, source.options)
    return lambda completions: [function(completion.sample) for completion in completions]


def _open_trained(context: StageContext, runtime: Runtime, folder: Path) -> torch.nn.Module:
    """The frozen reward model of an earlier stage."""
    config = context.config
    dtype = DTYPES[config.model.dtype]
    return runtime.hold(
        open_artifact(folder, base_folder=context.base_folder, config=config, weights_dtype=dtype, scores=True)
    )


def _open_folder(context: StageContext, runtime: Runtime, folder: Path) -> torch.nn.Module:
    if not folder.is_dir():
        raise ConfigError(f"rewards: model:{folder} is not a folder; give one with a sequence-classification model")
    if load_facts(folder).core != load_facts(context.base_folder).core:
        raise ConfigError(
            f"rewards: the tokenizer of {folder} is not the policy's; use a reward model of the same family"
        )
    dtype = DTYPES[context.config.model.dtype]
    return runtime.hold(load_scorer(folder, context.config, weights_dtype=dtype, packed=False))


def _by_model(runtime: Runtime, model: torch.nn.Module) -> Score:
    @torch.no_grad()
    def score(completions: Sequence[Scored]) -> list[float]:
        found: list[float] = []
        # Every rank helps to gather the layers of a sharded model, also with nothing of its own left to score.
        count = len(completions) if runtime.scoring is None else runtime.largest_over_ranks(len(completions))
        for first in range(0, count, SCORED_AT_ONCE):
            part = completions[first : first + SCORED_AT_ONCE]
            texts = [np.array([*one.prompt_ids, *one.completion_ids], dtype=np.int64) for one in part]
            numbers = list(range(len(texts))) or [-1]
            texts = texts or [np.zeros(1, dtype=np.int64)]
            batch = batch_of([(ids, np.zeros(len(ids), dtype=np.bool_)) for ids in texts], numbers)
            found += document_scores(runtime, model, batch.to(runtime.device)).tolist()
        return found

    return score


SCORED_AT_ONCE = 16
