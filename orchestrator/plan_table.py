"""The plan as a person reads it; must not import torch."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from datetime import datetime

from rich.console import Console
from rich.table import Table

from orchestrator.config.run import RunConfig
from orchestrator.memory_table import memory_line, memory_table
from orchestrator.plan import Plan, StagePlan
from orchestrator.scaling import ScalingRow, problems_of, scaling_table
from orchestrator.tables import PIPED_WIDTH, warn_lines
from orchestrator.time_table import finish_line, forecast_rows

UNKNOWN = "known after prepare"


def print_plan(plan: Plan, config: RunConfig) -> None:
    """The plan as tables."""
    console = Console()
    console.print(_pairs(f"run {plan.name}", _run_rows(plan, config)))
    for stage in plan.stages:
        console.print(_pairs(f"stage {stage.name}", _stage_rows(stage)))
        if stage.memory is not None:
            console.print(memory_table(stage.memory))
    warn_lines(plan)
    finish = finish_line(plan, datetime.now())
    if finish is not None:
        console.print(finish)
    console.print("nothing was written or submitted; the same words without `plan` run it", style="dim")


def print_scaling(rows: Sequence[ScalingRow], config: RunConfig) -> None:
    """A table for every training stage, and why rows are empty."""
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
    for name in dict.fromkeys(row.stage for row in rows):
        own = [row for row in rows if row.stage == name]
        console.print(scaling_table(own, f"stage {name} of {config.name}, sharding {config.sharding.strategy}"))
        known = next((row.time for row in own if row.time is not None and row.time.step_seconds is not None), None)
        console.print("\n".join([*problems_of(own), *([] if known is None else [f"estimate from {known.basis}"])]))


def _pairs(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def _run_rows(plan: Plan, config: RunConfig) -> list[tuple[str, str]]:
    sharding = plan.sharding if plan.sharding != "none" else "none (DDP)" if config.world_size > 1 else "none"
    return [
        ("folder", plan.run_directory),
        ("base", f"{plan.base} ({plan.base_source}), {config.model.dtype}"),
        ("method", f"tuning {plan.tuning}, quantization {plan.quantization}, sharding {sharding}"),
        (
            "ranks",
            f"{plan.nodes} nodes x {plan.processes_per_node} processes = {config.world_size}, launcher {plan.launcher}",
        ),
    ]


def _stage_rows(stage: StagePlan) -> list[tuple[str, str]]:
    rows = (
        UNKNOWN if stage.train_rows is None else f"{stage.train_rows:,} train, {stage.evaluation_rows or 0:,} held out"
    )
    batch = (
        "nothing is trained; one process"
        if stage.global_size is None
        else f"{stage.global_size} a step = {stage.micro_size} micro x {stage.world_size} ranks x {stage.accumulation_steps} accumulation"
    )
    return [
        (
            "data",
            f"{stage.data_source} ({stage.data_format or 'format known after prepare'}), packing {stage.packing}, at most {stage.max_length} tokens",
        ),
        ("rows", rows),
        ("batch", batch),
        ("steps", _steps(stage)),
        (
            "learning rate",
            ", ".join(f"{rate:.3g} at {point}" for point, rate in stage.learning_rates.items())
            or (UNKNOWN if stage.global_size is not None else "none"),
        ),
        ("parameters", _parameters(stage)),
        *([] if stage.attention is None else [("attention", stage.attention)]),
        *([] if stage.loss_head is None else [("loss head", stage.loss_head)]),
        ("memory per device", memory_line(stage.memory)),
        *forecast_rows(stage),
        ("script", stage.script),
        ("makes", ", ".join(stage.outputs)),
    ]


def _steps(stage: StagePlan) -> str:
    if stage.steps is None:
        return UNKNOWN if stage.global_size is not None else "none"
    epoch = (
        ""
        if stage.steps_per_epoch is None
        else f", {stage.steps_per_epoch} an epoch ({stage.steps / stage.steps_per_epoch:.2f} epochs)"
    )
    return f"{stage.steps}{epoch}, {stage.warmup_steps} of them warm-up"


def _parameters(stage: StagePlan) -> str:
    if stage.parameters is not None and stage.global_size is None:
        return f"{stage.parameters:,}; none is trained"
    if stage.parameters is None or stage.trainable_parameters is None:
        return "known after the base was fetched"
    share = stage.trainable_parameters / stage.parameters
    return f"{stage.parameters:,}; {stage.trainable_parameters:,} trained ({share:.2%})"
