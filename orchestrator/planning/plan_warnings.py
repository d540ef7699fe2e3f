"""Warnings of a plan: origin of the base, memory, and how often rows are repeated. Must not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.architecture.base_model import Base
from orchestrator.config.demonstration import DEMONSTRATIONS
from orchestrator.config.run import RunConfig, training_pipeline
from orchestrator.config.training import TrainingStage
from orchestrator.config.tuning import FullTuning
from orchestrator.planning.data_facts import DataFacts
from orchestrator.planning.records import StagePlan
from orchestrator.planning.stage_forecast import epoch_steps, guessed_epoch_steps
from orchestrator.schedule import total_steps

USUAL_EPOCHS = 3
"""The number of epochs suggested if rows are repeated too often; equal to conf/stage/sft.yaml."""
MANY_PASSES = 5.0
"""More passes than this over a user's rows are rarely meant: fine-tuning takes 1 to 5."""

MOST_FOR_WHOLE_MODELS = 2e-4
"""conf/optimizer/adamw.yaml: usual for adapters. Full fine-tuning is published with 1e-5 to 1e-4."""


def plan_warnings(
    config: RunConfig, base: Base, stages: Sequence[StagePlan], data: Mapping[str, DataFacts]
) -> list[str]:
    """Every warning of a plan, in print order."""
    found = [*_warnings(base, stages), *_rate_warnings(config)]
    return [*found, *_template_warnings(config, data), *_pass_warnings(config, data)]


def _rate_warnings(config: RunConfig) -> list[str]:
    """`tuning=full` on an adapter experiment keeps its learning rate, at which a whole model diverges or forgets."""
    return [
        f"stages.{name}.optimizer.lr={stage.optimizer.lr:g} is a rate for adapters; full fine-tuning needs about a "
        f"tenth of it: type stages.{name}.optimizer.lr={stage.optimizer.lr / 10:g}"
        for name, stage in training_pipeline(config).items()
        if isinstance(config.for_stage(name).tuning, FullTuning) and stage.optimizer.lr > MOST_FOR_WHOLE_MODELS
    ]


def _template_warnings(config: RunConfig, data: Mapping[str, DataFacts]) -> list[str]:
    """Plain prompts on a base that expects its chat template are legal but rarely intended."""
    return [
        f"stages.{name}.data.train: format {facts.format} is plain text, which bypasses the chat template of {config.model.base}; "
        f"to apply the template type {facts.templated}"
        for name, facts in data.items()
        if name in config.pipeline and facts.templated is not None
    ]


def _warnings(base: Base, stages: Sequence[StagePlan]) -> list[str]:
    warnings: list[str] = []
    if base.source == "package":
        warnings.append(
            f"the base comes from the package {base.location}: 4-bit weights, dequantised; not the hub's original"
        )
    for stage in stages:
        memory = stage.memory
        if memory is not None and memory.verdict in ("TIGHT", "NO"):
            host = (
                ""
                if memory.node_memory_gib is None
                else f", a node's host {memory.node_gib:.0f} of {memory.node_memory_gib:g}"
            )
            warnings.append(
                f"stages.{stage.name}: {memory.verdict}: {memory.low:.1f} to {memory.high:.1f} GiB of {memory.memory_gib:g} in phase "
                f"{memory.binding}{host}; `plan advise=true` with the same overrides shows what fits"
            )
    return warnings


def _pass_warnings(config: RunConfig, data: Mapping[str, DataFacts]) -> list[str]:
    """A sentence for every stage whose `max_steps` covers only a part of the user's rows, or repeats them very
    often.
    """
    stages = training_pipeline(config)
    return [
        sentence
        for name, stage in stages.items()
        if name in data and (sentence := _sentence(name, stage, data[name])) is not None
    ]


def _sentence(name: str, stage: TrainingStage, data: DataFacts) -> str | None:
    """The demonstration's own recipe fits its rows, and explicit `epochs` need no explanation."""
    exact = epoch_steps(stage, data)
    per_epoch = exact or guessed_epoch_steps(stage, data)
    is_ours = stage.data.train.path in DEMONSTRATIONS and not stage.data.mix
    if stage.max_steps is None or per_epoch is None or is_ours:
        return None
    passes = stage.max_steps / per_epoch
    is_short = stage.max_steps < per_epoch
    if not is_short and passes <= MANY_PASSES:
        return None
    epochs = 1 if is_short else USUAL_EPOCHS
    steps = total_steps(max_steps=None, epochs=epochs, steps_per_epoch=per_epoch)
    about = "" if exact else "about "
    over = _over(stage, data, about=about)
    seen = (
        f"sees {about}{passes:.2g} of a pass over {over}: most are never trained on"
        if passes < 0.5
        else f"ends before one pass over {over} ({about}{passes:.2f} of it)"
        if is_short
        else f"is {about}{passes:.3g} passes over {over}"
    )
    return (
        f"stages.{name}.max_steps={stage.max_steps} {seen}; for {'a whole pass' if is_short else f'{epochs} passes'} type "
        f"stages.{name}.epochs={epochs} instead ({about}{steps:,} steps)"
    )


def _over(stage: TrainingStage, data: DataFacts, *, about: str) -> str:
    what = "prompts" if stage.reads_prompts else "rows"
    is_counted = data.train_rows is not None and not about and stage.data.packing == "none"
    return f"the {data.train_rows:,} {what}" if is_counted else f"the {what}"
