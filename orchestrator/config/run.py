"""The whole configuration of a run. Defaults are in conf/. Must not import torch."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from orchestrator.config.alignment import DpoStage, PolicyStage, RewardStage
from orchestrator.config.base import Identifier, NaturalInt, Section, Text
from orchestrator.config.classification import ClassifyStage, SelfTrainingStage
from orchestrator.config.cluster import ClusterConfig, LauncherConfig
from orchestrator.config.data import DataConfig
from orchestrator.config.evaluation import FIRST_SET, EvaluateStage
from orchestrator.config.merging import InterpolateStage, MergeStage, SoupStage
from orchestrator.config.model import ModelConfig, Nf4Quantization, NoQuantization
from orchestrator.config.sharding import NoSharding, ZeroSharding
from orchestrator.config.stage import Product, StageSettings
from orchestrator.config.study import Study
from orchestrator.config.tracking import NoTracking, WandbTracking
from orchestrator.config.training import SftStage, TrainingStage
from orchestrator.config.tuning import Tuning

Quantization = Annotated[NoQuantization | Nf4Quantization, Field(discriminator="scheme")]
Sharding = NoSharding | ZeroSharding
Tracking = Annotated[WandbTracking | NoTracking, Field(discriminator="kind")]
TrainedStage = SftStage | RewardStage | DpoStage | PolicyStage | ClassifyStage | SelfTrainingStage
Stage = Annotated[TrainedStage | EvaluateStage | InterpolateStage | SoupStage | MergeStage, Field(discriminator="kind")]


def kinds_that_make(*products: Product) -> tuple[str, ...]:
    """The kinds of stages whose artifact is one of these, in the order of `Stage`."""
    classes: tuple[type[StageSettings], ...] = get_args(get_args(Stage)[0])
    return tuple(get_args(one.model_fields["kind"].annotation)[0] for one in classes if one.makes in products)


POLICY_KINDS = kinds_that_make("policy")
"""Stages that yield a policy, which a later stage can continue from."""
CLASSIFIER_KINDS = kinds_that_make("classifier")
PARENT = "parent"
"""Value of `start_from` in a fork: the artifact of the original run, copied into the fork's own folder."""
RESERVED_STAGE_NAMES = ("prepare", "scripts", "superseded", "export", PARENT)


class Seeds(Section):
    """Two sources of variance, kept apart (2002.06305), and the choice of rows, which must be equal for the two to be
    compared.
    """

    weights: NaturalInt
    """Seed of newly initialised weights (adapters, heads) and of dropout."""
    data: NaturalInt
    """Seed of the order of the rows."""
    split: NaturalInt
    """Seed of the held-out split and of the rows that a mixture draws."""


class RunConfig(Section):
    """The whole configuration of a run."""

    name: Identifier
    """The run folder is output_dir/name."""
    seed: NaturalInt
    seeds: Seeds
    output_dir: Text
    pipeline: tuple[str, ...]
    """Stages in order."""
    stages: dict[str, Stage]
    model: ModelConfig
    tuning: Tuning
    quantization: Quantization
    sharding: Annotated[Sharding, Field(discriminator="strategy")]
    cluster: ClusterConfig
    launcher: LauncherConfig
    tracking: Tracking
    profile: bool
    """Write the seconds of every part of a step to metrics.jsonl, and a trace of a few steps to STAGE/profile."""
    study: Annotated[Study, Field(discriminator="kind")]
    """Several runs of this configuration, and how they are compared."""

    @property
    def world_size(self) -> int:
        return self.cluster.nodes * self.cluster.processes_per_node

    def for_stage(self, name: str) -> RunConfig:
        """The configuration as a stage sees it: `tuning` is the stage's own if it has one; a stage that trains nothing
        inherits that of the stage it starts from.
        """
        return self.model_copy(update={"tuning": _tuning_of(self, name)})


def _tuning_of(config: RunConfig, name: str) -> Tuning:
    """Follow `start_from` to a stage that trains; fall back to the run's tuning if there is none (or if stages wrongly
    form a cycle).
    """
    seen: set[str] = set()
    while name not in seen:
        seen.add(name)
        stage = config.stages[name]
        if isinstance(stage, TrainingStage):
            return config.tuning if stage.tuning is None else stage.tuning
        start = stage.start_from or next(iter(stage.blended_stages), None)
        name = start if start in config.stages else name
    return config.tuning


def makes_classifier(config: RunConfig, name: str) -> bool:
    """Whether a stage's artifact is a classifier: trained, or interpolated from two of them."""
    seen: set[str] = set()
    while name not in seen:
        seen.add(name)
        stage = config.stages[name]
        if stage.follows_start and stage.start_from in config.stages:
            name = stage.start_from
    return config.stages[name].makes == "classifier"


def made_kind(config: RunConfig, name: str) -> str:
    """The kind of a stage as its successors see it; `classify` for an interpolation of classifiers, since it yields
    one.
    """
    kind = config.stages[name].kind
    return "classify" if makes_classifier(config, name) and kind not in CLASSIFIER_KINDS else kind


def training_stages(config: RunConfig) -> dict[str, TrainedStage]:
    """The stages of the pipeline that train, by name."""
    stages = {name: stage for name, stage in config.stages.items() if name in config.pipeline}
    return {name: stage for name, stage in stages.items() if isinstance(stage, TrainingStage)}


def training_pipeline(config: RunConfig) -> dict[str, TrainedStage]:
    """The stages of the pipeline that train, in order."""
    stages = training_stages(config)
    return {name: stages[name] for name in config.pipeline if name in stages}


def data_sets_of(stage: Stage) -> dict[str, DataConfig]:
    """Every set of rows that a stage reads, by its key within the stage; `data` is the first."""
    return {FIRST_SET: stage.data, **stage.further_data}


def tunings_of(config: RunConfig) -> dict[str, Tuning]:
    """How each stage of the pipeline that trains is tuned, by name, in the order of the pipeline."""
    return {name: _tuning_of(config, name) for name in training_pipeline(config)}


def has_new_heads(config: RunConfig) -> bool:
    """Whether every training stage puts a new head on the model, which is trained under every `tuning`."""
    stages = training_stages(config).values()
    return bool(stages) and all(stage.has_new_head for stage in stages)


def accumulation_steps(config: RunConfig, stage: TrainingStage) -> int:
    """Micro-batches of one rank in one optimizer step; the rule `batch_problems` makes it exact."""
    return stage.batch.global_size // (stage.batch.micro_size * config.world_size)


def fitting_micro_size(*, global_size: int, micro_size: int, world_size: int) -> int | None:
    """The largest micro-batch up to `micro_size` that divides a rank's share of the global batch; None if there is
    none.
    """
    share, rest = divmod(global_size, world_size)
    if rest:
        return None
    return next(size for size in range(min(micro_size, share), 0, -1) if share % size == 0)
