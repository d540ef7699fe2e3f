"""Which settings may change on a resume, and how a change of ranks affects the micro-batches. Must not import torch."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.config.base import JsonValue, flatten
from orchestrator.config.run import RunConfig, fitting_micro_size, training_stages
from orchestrator.errors import ConfigError

JsonObject = dict[str, JsonValue]

FREE = (
    "name",
    "output_dir",
    "pipeline",
    "cluster",
    "launcher",
    "tracking",
    "study",
    "sharding",
    "model.preset",
    "model.shard_gib",
    "profile",
)
"""Keys that decide where and how a run is computed, not its result."""
FREE_OF_A_STAGE = (
    "checkpoint",
    "faults",
    "ledger",
    "metrics",
    "callbacks",
    "log_every_steps",
    "evaluate_every_steps",
    "pause_at_step",
    "batch.micro_size",
    "data.num_processes",
)


def may_differ(config: RunConfig) -> frozenset[str]:
    """Dotted keys, with all below them, that may change between attempts: those without effect on the result, and
    accepted ones.
    """
    free = {f"stages.{name}.{key}" for name in config.stages for key in FREE_OF_A_STAGE}
    accepted = {key for stage in training_stages(config).values() for key in stage.checkpoint.accept_changes}
    return (frozenset(FREE) | free) - _decisive(config) | accepted


def _decisive(config: RunConfig) -> frozenset[str]:
    """Keys that may change unless early stopping depends on them, or the loss compares the rows of a micro-batch."""
    stages = training_stages(config)
    judged = {
        f"stages.{name}.{key}"
        for name, stage in stages.items()
        if stage.early_stopping is not None
        for key in ("evaluate_every_steps", "metrics")
    }
    paired = {f"stages.{name}.batch.micro_size" for name, stage in stages.items() if stage.compares_rows}
    return frozenset(judged | paired)


def settings_that_matter(config: RunConfig, stage: str) -> dict[str, JsonValue]:
    """The leaves that decide a stage's result, by dotted key; `tuning` is the stage's own."""
    config = config.for_stage(stage)
    free = (frozenset(FREE) | {f"stages.{stage}.{key}" for key in FREE_OF_A_STAGE}) - _decisive(config)
    others = {f"stages.{name}" for name in config.stages if name != stage}
    leaves = flatten(config.model_dump(mode="json"))
    return {key: value for key, value in leaves.items() if not is_below(key, free | others)}


def refuse_changes(
    old: Mapping[str, JsonValue], new: Mapping[str, JsonValue], *, stage: str, accepted: frozenset[str]
) -> list[str]:
    """Raise ConfigError with old and new value of every changed setting; return the accepted changes as sentences."""
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    sentences = {key: f"{key}: {old.get(key)} in the checkpoint, {new.get(key)} now" for key in changed}
    refused = [key for key in changed if not is_below(key, accepted)]
    if refused:
        advice = f"repeat the old value, start a new run with name=, or type stages.{stage}.checkpoint.accept_changes=[{','.join(refused)}]"
        raise ConfigError([*(sentences[key] for key in refused), advice])
    return [sentences[key] for key in changed]


def elsewhere(values: JsonObject, *, nodes: int, processes_per_node: int) -> tuple[JsonObject, list[str]]:
    """The plain configuration of a run on another number of ranks, and the resulting change of the micro-batches.

    The global batch is kept, and with it order, schedule and result; if the micro-batch no longer divides a rank's
    share of it, the next smaller divisor is taken. ConfigError if the ranks cannot share the global batch.
    """
    cluster, stages = _object(values["cluster"]), _object(values["stages"])
    ranks = nodes * processes_per_node
    changes: list[str] = []
    moved: JsonObject = {}
    for name, section in stages.items():
        stage = _object(section)
        if "batch" not in stage:
            moved[name] = stage
            continue
        batch = _object(stage["batch"])
        global_size, micro_size = _whole(batch["global_size"]), _whole(batch["micro_size"])
        fitting = fitting_micro_size(global_size=global_size, micro_size=micro_size, world_size=ranks)
        if fitting is None:
            raise ConfigError(
                f"stages.{name}.batch: {ranks} ranks cannot share {global_size} rows; use a number of ranks that divides it"
            )
        moved[name] = {**stage, "batch": {**batch, "micro_size": fitting}}
        changes.append(
            f"{name}: {ranks} ranks x {global_size // ranks // fitting} micro-batches x {fitting} rows = {global_size}"
        )
    cluster = {**cluster, "nodes": nodes, "processes_per_node": processes_per_node}
    return {**values, "cluster": cluster, "stages": moved}, changes


def _object(value: JsonValue) -> JsonObject:
    assert isinstance(value, dict), "the configuration was valid when it was frozen"
    return value


def _whole(value: JsonValue) -> int:
    assert isinstance(value, int), "the configuration was valid when it was frozen"
    return value


def is_below(key: str, roots: frozenset[str]) -> bool:
    """Whether a dotted key is one of the roots or below one."""
    parts = key.split(".")
    return any(".".join(parts[:depth]) in roots for depth in range(1, len(parts) + 1))
