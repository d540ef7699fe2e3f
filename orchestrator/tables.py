"""Tables and sentences that a person reads; must not import torch."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from orchestrator.config.run import RunConfig
from orchestrator.memory_table import memory_line, memory_table
from orchestrator.plan import Plan, StagePlan
from orchestrator.rundir import StageFolder, read_json
from orchestrator.scaling import ScalingRow, problems_of, scaling_table
from orchestrator.time_table import finish_line, forecast_rows

PIPED_WIDTH = 120
"""Characters of a line of a table that goes to a file or another program."""
UNKNOWN = "known after prepare"
SHOWN_CLASSES = 20
"""A larger confusion matrix is read in result.json."""


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


def warn_lines(plan: Plan) -> None:
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def print_result(folder: StageFolder, config: RunConfig) -> None:
    """What a finished stage made, and how to use it."""
    result = read_json(folder.result)
    if "eval_loss_before" not in result:
        print("\n".join([f"\nstage {result['stage']} is done and proven", *_told(result)]))
        return
    before, after = result["eval_loss_before"], result["eval_loss_after"]
    lines = [
        f"held-out loss     {_loss(before)} before, {_loss(after)} after",
        f"speed             {_speed(result['tokens_per_second'])}, {result['seconds']:.0f} s in all",
        f"{result['artifact']['kind']:<17} {result['artifact']['path']}",
        f"proof             re-opened in a fresh process, it scores {result['proof']['reopened_loss']:.5f}; "
        f"the trainer scored {result['proof']['loss']:.5f}",
    ]
    if "best_step" in result and result["best_step"] is not None:
        end = result["stopped_early_at"]
        ended = "trained to the end" if end is None else f"stopped early at step {end}"
        lines.insert(1, f"early stopping    {ended}; the weights are those of step {result['best_step']}, the best")
    lines[1:1] = [*_worse(before, after), *_judged(result)]
    if result["wandb"]:
        lines.append(f"W&B               {result['wandb']}")
    print("\n".join([f"\nstage {result['stage']} is done and proven", *lines, "load it with", *_loading(result)]))


def _worse(before: float | None, after: float | None) -> list[str]:
    """A stage that did harm says so: a proven artifact is what was trained, which need not be better than its start."""
    if before is None or after is None or not after > before:
        return []
    return [
        f"warning           the held-out loss rose by {after - before:.4f}: on these rows this is worse than what the stage started from"
    ]


def _speed(tokens_per_second: float | None) -> str:
    """None where the attempts that trained left no record."""
    return "unknown" if tokens_per_second is None else f"{tokens_per_second:,.0f} tokens/s (median of the steps)"


def _told(result: dict[str, Any]) -> list[str]:
    """What an evaluation or a merge found."""
    lines = [f"{result['artifact']['kind']:<17} {result['artifact']['path']}"]
    if result["kind"] == "evaluate":
        if "scores" not in result:  # of a classifier
            return [*lines, *(_told_set(name, told) for name, told in result["sets"].items())]
        scores = result["scores"]
        return [
            *lines,
            *(
                f"{name:<17} {scores['base'][name]:.4f} base, {value:.4f} tuned"
                for name, value in scores["tuned"].items()
            ),
            result["lost"],
        ]
    if result["kind"] in ("interpolate", "soup"):
        chosen = (
            f"a={result['alpha']:g}, {result['why']}"
            if result["kind"] == "interpolate"
            else ", ".join(result["members"])
        )
        return [
            *lines,
            f"{'chosen' if result['kind'] == 'interpolate' else 'soup of':<17} {chosen}",
            f"scores            {result['curves']}",
        ]
    merged = f"{result['kl']:.2e} nats a token from the trained model, same next token {result['agreement']:.2%}"
    return [*lines, f"merged            into the {result['way']}: {merged}"]


def _told_set(name: str, told: dict[str, Any]) -> str:
    """What a classifier did on one set."""
    numbers = [f"{key} {value:.4f}" for key, value in told.items() if isinstance(value, float)]
    return f"{name + (' (shift)' if told['shift'] else ''):<17} {told['rows']} rows: {', '.join(numbers)}"


def _judged(result: dict[str, Any]) -> list[str]:
    """A classifier's metrics and its confusion matrix."""
    told = result.get("classification")
    if told is None or told["held_out"] is None:
        return []
    held = told["held_out"]
    numbers = [f"{name} {value:.4f}" for name, value in held.items() if isinstance(value, float) and name != "loss"]
    lines = [f"held-out rows     {held['rows']}: {', '.join(numbers)}"]
    if "confusion" in held and len(told["names"]) <= SHOWN_CLASSES:
        width = max(map(len, told["names"]))
        lines += [
            f"{'true' if place == 0 else '':<17} {name:<{width}} {' '.join(f'{count:>5}' for count in row)}"
            for place, (name, row) in enumerate(zip(told["names"], held["confusion"], strict=True))
        ]
    return lines


def _loading(result: dict[str, dict[str, str]]) -> list[str]:
    artifact, base = result["artifact"], result["base"]
    if artifact["kind"].startswith("reward_"):
        return [
            "  from transformers import AutoModelForSequenceClassification as Scorer",
            *(["  from peft import PeftModel"] if artifact["kind"] == "reward_adapter" else []),
            f"  model = Scorer.from_pretrained({base['folder'] if artifact['kind'] == 'reward_adapter' else artifact['path']!r}, num_labels=1)",
            *(
                [f"  model = PeftModel.from_pretrained(model, {artifact['path']!r})"]
                if artifact["kind"] == "reward_adapter"
                else []
            ),
        ]
    if artifact["kind"].startswith("classifier_"):
        return _loading_classifier(artifact, base)
    if artifact["kind"] == "model":
        return [
            "  from transformers import AutoModelForCausalLM",
            f"  model = AutoModelForCausalLM.from_pretrained({artifact['path']!r})",
        ]
    return [
        "  from peft import PeftModel",
        "  from transformers import AutoModelForCausalLM",
        f"  base = AutoModelForCausalLM.from_pretrained({base['folder']!r})",
        f"  model = PeftModel.from_pretrained(base, {artifact['path']!r})",
    ]


def _loading_classifier(artifact: dict[str, str], base: dict[str, str]) -> list[str]:
    start = "  from transformers import AutoModelForSequenceClassification as Classifier"
    if artifact["kind"] == "classifier_model":
        return [start, f"  model = Classifier.from_pretrained({artifact['path']!r})"]
    return [
        start.replace("import", "import AutoConfig,"),
        "  from peft import PeftModel",
        f"  config = AutoConfig.from_pretrained({artifact['path']!r})",
        f"  model = PeftModel.from_pretrained(Classifier.from_pretrained({base['folder']!r}, config=config), {artifact['path']!r})",
    ]


def _loss(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


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
