"""The scaling table: one plan per number of nodes, at the same global batch. Must not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.architecture.base_model import Base
from orchestrator.config.base import Section
from orchestrator.config.run import RunConfig, fitting_micro_size, training_stages
from orchestrator.config.training import TrainingStage
from orchestrator.estimate.cost import CostPlan
from orchestrator.estimate.stage_time import CheckpointPlan, TimePlan
from orchestrator.planning.data_facts import DataFacts
from orchestrator.planning.plan import make_plan
from orchestrator.planning.records import StagePlan


class ScalingRow(Section):
    """One stage on one number of nodes."""

    stage: str
    nodes: int
    devices: int
    global_size: int
    micro_size: int | None
    """None if this many ranks cannot share the global batch."""
    accumulation_steps: int | None
    time: TimePlan | None
    cost: CostPlan | None
    checkpointing: CheckpointPlan | None
    efficiency: float | None
    """Tokens per second and device, relative to the first row that has any."""
    problem: str | None


def scaling_rows(
    config: RunConfig, counts: Sequence[int], *, base: Base, data: Mapping[str, DataFacts]
) -> list[ScalingRow]:
    """The rows of every training stage, stage by stage. The global batch is constant; the micro-batch shrinks if
    necessary.
    """
    rows: list[ScalingRow] = []
    for name in training_stages(config):
        first: float | None = None
        for nodes in counts:
            row = _row(config, name, nodes, base, data)
            rate = None if row.time is None else row.time.tokens_per_second_per_device
            first = first or rate
            efficiency = None if rate is None or first is None else rate / first
            rows.append(row.model_copy(update={"efficiency": efficiency}))
    return rows


def problems_of(rows: Sequence[ScalingRow]) -> list[str]:
    """Why rows have no numbers, each reason once."""
    return list(dict.fromkeys(row.problem for row in rows if row.problem is not None))


def _row(config: RunConfig, name: str, nodes: int, base: Base, data: Mapping[str, DataFacts]) -> ScalingRow:
    stage = training_stages(config)[name]
    cluster = config.cluster.model_copy(update={"nodes": nodes})
    devices = nodes * cluster.processes_per_node
    size = stage.batch.global_size
    micro = fitting_micro_size(global_size=size, micro_size=stage.batch.micro_size, world_size=devices)
    planned: StagePlan | None = None
    if stage.generation is not None and stage.generation.prompts % devices:
        micro = None
    if micro is not None:
        batch = stage.batch.model_copy(update={"micro_size": micro})
        update = {"cluster": cluster, "stages": {name: stage.model_copy(update={"batch": batch})}, "pipeline": (name,)}
        (planned,) = make_plan(config.model_copy(update=update), base=base, data=data).stages
    return ScalingRow(
        stage=name,
        nodes=nodes,
        devices=devices,
        global_size=size,
        micro_size=micro,
        accumulation_steps=None if planned is None else planned.accumulation_steps,
        time=None if planned is None else planned.time,
        cost=None if planned is None else planned.cost,
        checkpointing=None if planned is None else planned.checkpointing,
        efficiency=None,
        problem=_problem(planned, stage),
    )


def _problem(planned: StagePlan | None, stage: TrainingStage) -> str | None:
    if planned is None:
        prompts = "" if stage.generation is None else f" (or {stage.generation.prompts} prompts of a rollout)"
        return (
            f"this many devices cannot share a global batch of {stage.batch.global_size}{prompts}: raise it, or use a "
            "number of devices that divides it"
        )
    return planned.time.basis if planned.time is not None and planned.time.step_seconds is None else None
