"""The scaling table: one plan for every number of nodes, at the same global batch, on paper; must not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from orchestrator.architecture.base_model import Base
from orchestrator.config.alignment import PolicyStage
from orchestrator.config.base import Section
from orchestrator.config.run import RunConfig, fitting_micro_size, training_stages
from orchestrator.config.training import TrainingStage
from orchestrator.display.forecast_text import duration_words, seconds_words
from orchestrator.errors import ConfigError
from orchestrator.estimate.cost import CostPlan
from orchestrator.estimate.stage_time import CheckpointPlan, TimePlan
from orchestrator.planning.plan import DataFacts, StagePlan, make_plan

KEY = "cluster.nodes="
ELLIPSIS = "..."


class ScalingRow(Section):
    """One stage on one number of nodes."""

    stage: str
    nodes: int
    devices: int
    global_size: int
    micro_size: int | None
    """None where so many ranks cannot share the global batch."""
    accumulation_steps: int | None
    time: TimePlan | None
    cost: CostPlan | None
    checkpointing: CheckpointPlan | None
    efficiency: float | None
    """Tokens a second and device over those of the first row that has any."""
    problem: str | None


def take_node_counts(arguments: Sequence[str]) -> tuple[list[str], list[int] | None]:
    """The words without `cluster.nodes=1,2,4,...,512`, and its numbers; None where no list is asked for.

    Three dots go on by the factor of the two numbers before them.
    """
    lists = [word for word in arguments if word.startswith(KEY) and "," in word and "-m" not in arguments]
    if not lists or "--multirun" in arguments:
        return list(arguments), None
    counts = _expanded(lists[-1].removeprefix(KEY).split(","), word=lists[-1])
    return [word for word in arguments if word not in lists], counts


def scaling_rows(
    config: RunConfig, counts: Sequence[int], *, base: Base, data: Mapping[str, DataFacts]
) -> list[ScalingRow]:
    """The rows of every training stage, stage by stage. The global batch stays; the micro-batch shrinks where it must."""
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


def scaling_table(rows: Sequence[ScalingRow], title: str) -> Table:
    """The rows of one stage for a person."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    names = ("nodes", "devices", "batch", "step", "tokens/s", "efficiency", "time", "device h", "$", "goodput")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(str(row.nodes), str(row.devices), *_cells(row))
    return table


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
    if isinstance(stage, PolicyStage) and stage.rollout.prompts % devices:
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
        prompts = f" (or {stage.rollout.prompts} prompts of a rollout)" if isinstance(stage, PolicyStage) else ""
        return (
            f"so many devices cannot share a global batch of {stage.batch.global_size}{prompts}: raise it, or take a "
            "divisor of it"
        )
    return planned.time.basis if planned.time is not None and planned.time.step_seconds is None else None


def _cells(row: ScalingRow) -> list[str]:
    if row.micro_size is None:
        return [f"{row.global_size} cannot be shared", *[""] * 7]
    batch = f"{row.global_size} = {row.micro_size} x {row.devices} x {row.accumulation_steps}"
    time, saving, cost = row.time, row.checkpointing, row.cost
    if time is None or time.step_seconds is None or saving is None:
        return [batch, "not forecast", *[""] * 6]
    return [
        batch,
        seconds_words(time.step_seconds),
        f"{time.tokens_per_second:,.0f}",
        "" if row.efficiency is None else f"{row.efficiency:.0%}",
        "" if time.hours is None else duration_words(time.hours),
        "" if cost is None else f"{cost.device_hours:,.4g}",
        "" if cost is None or cost.dollars is None else f"{cost.dollars:,.0f}",
        f"{saving.best_goodput:.2%}",
    ]


def _expanded(parts: Sequence[str], *, word: str) -> list[int]:
    counts: list[int] = []
    for place, part in enumerate(parts):
        if part.strip() == ELLIPSIS and 2 <= place < len(parts) - 1:
            counts += _between(counts, _count(parts[place + 1], word), word)
        else:
            counts.append(_count(part, word))
    return counts


def _between(counts: Sequence[int], last: int, word: str) -> list[int]:
    """What the three dots stand for."""
    factor, rest = divmod(counts[-1], counts[-2])
    if rest or factor < 2:
        raise ConfigError(f"{word}: three dots go on by the factor of the two numbers before them; type 1,2,4,...,512")
    found: list[int] = []
    while (following := (found or counts)[-1] * factor) < last:
        found.append(following)
    return found


def _count(text: str, word: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise ConfigError(f"{word}: {text or 'nothing'} is no number of nodes; type {KEY}1,2,4,...,512")
    return int(text)
