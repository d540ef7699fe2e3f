"""Formats the plan as text: one screen, or everything; a table of several runs. Must not import torch."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from datetime import datetime

from rich.console import Console
from rich.table import Table

from orchestrator.config.run import RunConfig
from orchestrator.display.forecast_text import cost_words, finish_line, forecast_rows, time_sentence
from orchestrator.display.memory_table import memory_line, memory_sentence, memory_table
from orchestrator.display.result_text import PIPED_WIDTH, warn_lines
from orchestrator.display.scaling_table import scaling_table
from orchestrator.planning.records import Plan, StagePlan
from orchestrator.planning.scaling import ScalingRow, problems_of
from orchestrator.text.durations import duration_words, seconds_words
from orchestrator.text.plurals import counted

SCREEN_WIDTH = 100
"""Line width of a plan that is written to a file or a pipe."""
UNKNOWN = "known once the data is prepared"
METHODS = {"lora": "LoRA", "full": "all weights", "freeze": "some layers"}
LAUNCHERS = {"local": "on this machine", "torchrun": "by torchrun", "slurm": "by Slurm"}

Rows = list[tuple[str, str]]


def print_plan(plan: Plan, config: RunConfig, *, everything: bool = False) -> None:
    """The plan on one screen; `everything` adds memory by phase, rates, kernels, communication, scripts and costs."""
    console = Console(width=None if sys.stdout.isatty() else SCREEN_WIDTH)
    console.print(_pairs(f"run {plan.name}", _run_rows(plan, config)))
    for number, stage in enumerate(plan.stages):
        rows = _stage_rows(stage) if number == 0 else _later_rows(stage, plan.stages[number - 1])
        console.print(_pairs(f"stage {stage.name}", rows))
        if everything:
            console.print(_pairs(f"stage {stage.name}, in detail", _detail_rows(stage, config)))
            if stage.memory is not None:
                console.print(memory_table(stage.memory))
    warn_lines(plan)
    finish = finish_line(plan, datetime.now())
    if finish is not None:
        console.print(finish)
    more = "" if everything else "; `plan --all` shows memory by phase, rates, scripts and more"
    console.print(f"nothing was written or started; the same command without `plan` runs it{more}", style="dim")


def print_plans(plans: Sequence[tuple[RunConfig, Plan]]) -> None:
    """One line for each run of a sweep; `plan` of a single run shows what they have in common."""
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
    table = Table(box=None, pad_edge=False, title=f"{counted(len(plans), 'run')}", title_justify="left")
    table.add_column("run", style="cyan", overflow="fold")
    for name in ("stages", "steps", "trained", "memory", "time"):
        table.add_column(name, justify="left" if name == "stages" else "right", no_wrap=name != "stages")
    for _, plan in plans:
        table.add_row(plan.name, ", ".join(stage.name for stage in plan.stages), *_sweep_cells(plan))
    console.print(table)
    for note in dict.fromkeys(note for _, plan in plans for note in plan.notes):
        print(f"note: {note}", file=sys.stderr)
    for warning in dict.fromkeys(warning for _, plan in plans for warning in plan.warnings):
        print(f"warning: {warning}", file=sys.stderr)
    console.print(
        "nothing was written or started; the same command without `plan` runs them; `plan -m --all` shows each in full",
        style="dim",
    )


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
    table.add_column(style="cyan", no_wrap=True, min_width=13)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def _sweep_cells(plan: Plan) -> list[str]:
    """Steps, trained parameters, the stage that needs most memory, and the time of the whole pipeline."""
    trained = [stage for stage in plan.stages if stage.global_size is not None]
    steps = [str(stage.steps) if stage.steps is not None else "?" for stage in trained]
    parameters = [stage.trainable_parameters for stage in trained if stage.trainable_parameters is not None]
    memories = [stage.memory for stage in plan.stages if stage.memory is not None]
    largest = max(memories, key=lambda memory: memory.expected, default=None)
    hours = [stage.time.hours for stage in trained if stage.time is not None and stage.time.hours is not None]
    return [
        " + ".join(steps) or "none",
        f"{max(parameters):,}" if parameters else "?",
        "?" if largest is None else f"{largest.expected:.1f} GiB" + ("" if largest.verdict in (None, "FIT") else " !"),
        duration_words(sum(hours)) if hours and len(hours) == len(trained) else "?",
    ]


def _run_rows(plan: Plan, config: RunConfig) -> Rows:
    return [
        ("folder", plan.run_directory),
        ("base", f"{plan.base} ({plan.base_source})"),
        ("number type", f"{plan.dtype}{' (auto)' if plan.dtype_is_auto else ''}: {plan.dtype_reason}"),
        ("method", _method(plan, config)),
        ("runs", _ranks(plan, config)),
    ]


def _method(plan: Plan, config: RunConfig) -> str:
    """`LoRA on 4-bit weights (nf4), sharded by zero2`; what is not used is not named."""
    parts = [METHODS.get(plan.tuning, plan.tuning)]
    parts += [] if plan.quantization == "none" else [f"on 4-bit weights ({plan.quantization})"]
    if plan.sharding != "none":
        parts.append(f", sharded ({plan.sharding})")
    elif config.world_size > 1:
        parts.append(", a copy of the model on every rank (DDP)")
    return " ".join(parts).replace(" ,", ",")


def _ranks(plan: Plan, config: RunConfig) -> str:
    where = LAUNCHERS[plan.launcher]
    if config.world_size == 1:
        return f"{where}, in 1 process"
    processes = counted(plan.processes_per_node, "process", "processes")
    if plan.nodes == 1:
        return f"{where}, in {processes}"
    return f"{where}, on {counted(plan.nodes, 'node')} with {processes} each: {config.world_size:,} ranks"


def _stage_rows(stage: StagePlan) -> Rows:
    """The lines that decide whether a user starts the run."""
    rows: Rows = [("data", _data(stage))]
    if stage.global_size is not None:
        rows += [("batch", _batch(stage)), ("steps", _steps(stage))]
    rows += [("trains", _parameters(stage)), ("memory", memory_sentence(stage.memory))]
    if stage.time is not None:
        rows.append(("time", time_sentence(stage.time)))
        # The reader must know whether the speed was measured or assumed before the number means anything.
        rows.append(("estimate from", stage.time.basis))
    if stage.cost is not None and (stage.cost.dollars is not None or stage.world_size > 1):
        rows.append(("cost", cost_words(stage.cost)))
    if stage.checkpointing is not None:
        every, size = stage.checkpointing.every_steps, stage.checkpointing.bytes / 2**20
        rows.append(
            ("checkpoints", f"{'at the end' if every is None else f'every {every} steps'}, {size:,.1f} MiB each")
        )
    return [*rows, ("makes", stage.outputs[0])]


def _later_rows(stage: StagePlan, before: StagePlan) -> Rows:
    """A further stage of a pipeline, in fewer lines, so that three or four stages still fit a screen or two."""
    rows: Rows = [("starts from", stage.input), ("data", _data(stage))]
    if stage.global_size is not None:
        trained = "" if stage.trainable_parameters is None else f"; {stage.trainable_parameters:,} parameters trained"
        rows.append(("steps", f"{_steps(stage, has_warmup=False)}; {_batch(stage)}{trained}"))
    rows.append(("memory", memory_sentence(stage.memory)))
    if stage.time is not None and stage.time.step_seconds is not None:
        rows.append(("time", time_sentence(stage.time)))
        if before.time is None or before.time.basis != stage.time.basis:
            rows.append(("estimate from", stage.time.basis))
    return rows


def _data(stage: StagePlan) -> str:
    rows = "rows counted once prepared" if stage.train_rows is None else f"{counted(stage.train_rows, 'row')}"
    held = f", {stage.evaluation_rows:,} held out" if stage.evaluation_rows else ""
    packed = "" if stage.packing == "none" else f", packed ({stage.packing})"
    form = f" ({stage.data_format})" if stage.data_format else ""
    return f"{stage.data_source}{form}: {rows}{held}; up to {stage.max_length:,} tokens{packed}"


def _batch(stage: StagePlan) -> str:
    """The batch size, with its product if that has more than one factor."""
    passes = stage.accumulation_steps or 1
    what = "sequence" if stage.packing == "none" else "packed sequence"
    total = f"{counted(stage.global_size or 0, what)} a step"
    if stage.world_size == 1 and passes == 1:
        return total
    each = f" on each of {stage.world_size:,} ranks" if stage.world_size > 1 else ""
    return f"{total}: {stage.micro_size} at a time{each}" + (f", in {passes:,} passes" if passes > 1 else "")


def _steps(stage: StagePlan, *, has_warmup: bool = True) -> str:
    if stage.steps is None:
        return UNKNOWN
    epochs = ""
    if stage.steps_per_epoch is not None:
        share = stage.steps / stage.steps_per_epoch
        epochs = f" = {share:.3g} {'epoch' if share == 1 else 'epochs'} of {stage.steps_per_epoch:,}"
    warm = (
        f"; the learning rate rises over the first {stage.warmup_steps:,}" if stage.warmup_steps and has_warmup else ""
    )
    return f"{stage.steps:,}{epochs}{warm}"


def _parameters(stage: StagePlan) -> str:
    if stage.global_size is None:
        return "nothing"
    if stage.parameters is None or stage.trainable_parameters is None:
        return "known once the base is fetched"
    share = stage.trainable_parameters / stage.parameters
    return f"{stage.trainable_parameters:,} of {stage.parameters:,} parameters ({share:.2%})"


def _detail_rows(stage: StagePlan, config: RunConfig) -> Rows:
    """What `--all` adds."""
    rates = ", ".join(f"{rate:.3g} at {point}" for point, rate in stage.learning_rates.items())
    rows: Rows = [] if stage.global_size is None else [("learning rate", rates or UNKNOWN)]
    rows += [] if stage.attention is None else [("attention", stage.attention)]
    rows += [] if stage.loss_head is None else [("loss head", stage.loss_head)]
    rows += [("device memory", memory_line(stage.memory)), *forecast_rows(stage)]
    if stage.cost is not None and config.cluster.hardware.dollars_per_hour is None:
        rows.append(("price", "set cluster.hardware.dollars_per_hour to see what it costs"))
    if stage.time is not None and stage.time.evaluation_seconds:
        rows.append(("evaluations", seconds_words(stage.time.evaluation_seconds)))
    return [*rows, ("script", stage.script), ("makes", ", ".join(stage.outputs))]
