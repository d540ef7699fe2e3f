"""User-defined metrics of held-out answers, measured with every evaluation. Must not know stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, cast

import torch.distributed as dist

from orchestrator.config.functions import MetricsConfig
from orchestrator.distributed.runtime import Runtime
from orchestrator.errors import ConfigError
from orchestrator.generation.greedy_answers import Answers
from orchestrator.metrics.phases import COMPLETIONS, METRICS
from orchestrator.rewards.builtin import Sample
from orchestrator.rewards.extensions import Metric, load_metric
from orchestrator.training.evaluation import Evaluation

Score = Callable[[], Evaluation | None]


def with_metrics(settings: MetricsConfig, runtime: Runtime, score: Score, answers: Answers) -> Score:
    """`score` with the user's metrics among its measures; `score` itself if there are none."""
    if not settings.functions:
        return score
    functions = [load_metric(function.source, function.options) for function in settings.functions]

    def scored() -> Evaluation | None:
        found = score()
        if found is None:
            return None
        with runtime.phases.during(METRICS, unit=COMPLETIONS):  # often takes longer than the evaluation itself
            mine = answers()
        measured = _measured(functions, _gathered(runtime, mine), runtime)
        clashes = sorted(measured.keys() & {*found.measures, "loss", "trained_tokens", "seconds"})
        if clashes:
            raise ConfigError(f"metrics: {', '.join(clashes)} is a built-in column; give another name")
        return replace(found, measures={**found.measures, **measured})

    return scored


def _gathered(runtime: Runtime, mine: Sequence[Sample]) -> list[Sample]:
    """The samples of all ranks in the order of their rows, on every rank."""
    if runtime.world_size == 1:
        return list(mine)
    parts: list[Any] = [None] * runtime.world_size
    dist.all_gather_object(parts, [asdict(sample) for sample in mine])
    longest = max(len(part) for part in parts)
    return [Sample(**part[index]) for index in range(longest) for part in parts if index < len(part)]


def _measured(functions: Sequence[Metric], samples: Sequence[Sample], runtime: Runtime) -> dict[str, float]:
    """Measured on rank 0 for all: a metric that draws random numbers must not let ranks disagree on early stopping."""
    outcome: list[Any] = [None]
    if runtime.is_main:
        outcome[0] = _outcome(functions, samples)
    if runtime.world_size > 1:
        dist.broadcast_object_list(outcome)
    # Raised on every rank: a single raising rank would leave the others waiting in the next collective.
    if isinstance(outcome[0], ConfigError):
        raise ConfigError(outcome[0].problems)
    return cast("dict[str, float]", outcome[0])


def _outcome(functions: Sequence[Metric], samples: Sequence[Sample]) -> Mapping[str, float] | ConfigError:
    measured: dict[str, float] = {}
    try:
        for function in functions:
            columns = function(samples)
            twice = sorted(columns.keys() & measured.keys())
            if twice:
                return ConfigError(f"metrics: {', '.join(twice)} is returned by two functions; give another name")
            measured |= columns
    except ConfigError as error:
        return error
    return measured
