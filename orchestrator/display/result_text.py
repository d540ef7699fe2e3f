"""Formats results as tables and sentences. Must not import torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.config.run import RunConfig
from orchestrator.metrics import phases as phase
from orchestrator.planning.records import Plan
from orchestrator.run_folder.folder import StageFolder, read_result
from orchestrator.run_state.artifact_kind import ArtifactKind
from orchestrator.run_state.loading_code import loading_lines
from orchestrator.text.durations import exact_words

PIPED_WIDTH = 120
"""Line width of a table that is written to a file or a pipe."""
SHOWN_CLASSES = 20
"""Larger confusion matrices are only in result.json."""
WIDEST_COLUMN = 12
AXES = "true \\ predicted"
SHOWN_SECONDS = 0.5
GROUPS = {
    phase.FETCHING: "base",
    phase.PREPARING: "data",
    phase.IMPORTING: "start",
    phase.LOADING: "load",
    phase.FIRST_STEP: "steps",
    phase.TRAINING: "steps",
    phase.TRIAL: "checkpoints",
    phase.SAVING: "checkpoints",
    phase.EVALUATION: "evaluations",
    phase.WRITING: "writing",
}
"""Phase -> its label in the line of times; others keep their name."""


def warn_lines(plan: Plan) -> None:
    for note in plan.notes:
        print(f"note: {note}", file=sys.stderr)
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def print_result(folder: StageFolder, config: RunConfig, *, wall_seconds: float) -> None:
    """Summary of a finished stage: artifact, quality, breakdown of the `wall_seconds` since the command, and how to use
    it.
    """
    result = read_result(folder)
    is_trained = "eval_loss_before" in result
    rows = [*(_trained_rows(result) if is_trained else _result_rows(result)), ("time", time_line(result, wall_seconds))]
    print(f"\nstage {result['stage']} is done and proven")
    for name, value in rows:
        print(f"{name:<17} {value}" if name else value)
    if is_trained:
        print("\n".join(["load it with", *_loading(result, folder.artifact)]))


def _trained_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    before, after = result["eval_loss_before"], result["eval_loss_after"]
    rows = [_held_out(result["kind"], before, after), *_worse(result["kind"], before, after), *_judged(result)]
    if result["best_step"] is not None:
        end = result["stopped_early_at"]
        ended = "trained to the end" if end is None else f"stopped early at step {end}"
        rows.append(("early stopping", f"{ended}; the weights are those of step {result['best_step']}, the best"))
    proof = result["proof"]
    rows += [
        (result["artifact"]["kind"].replace("_", " "), result["artifact"]["path"]),
        (
            "proof",
            f"read back from its files by a fresh process: loss {proof['reopened_loss']:.5f}; in training {proof['loss']:.5f}",
        ),
        ("speed", _speed(result["tokens_per_second"])),
    ]
    return [*rows, *([("W&B", result["wandb"])] if result["wandb"] else [])]


def time_line(result: dict[str, Any], wall_seconds: float) -> str:
    """`96 s in all: start 10 s, load 5 s, ...`; the rest of the command's time passed before a rank began."""
    known: dict[str, float] = result["phase_seconds"]
    parts = {"start": max(0.0, wall_seconds - sum(known.values()))}
    for name, seconds in known.items():
        group = GROUPS.get(name, name)
        parts[group] = parts.get(group, 0.0) + seconds
    shown = [f"{name} {exact_words(seconds)}" for name, seconds in parts.items() if seconds >= SHOWN_SECONDS]
    return f"{exact_words(wall_seconds)} in all" + (f": {', '.join(shown)}" if shown else "")


def _held_out(kind: str, before: float | None, after: float | None) -> tuple[str, str]:
    """The reward of a policy, which the record has as a negative loss."""
    if kind == "grpo":
        before, after = (None if value is None else -value for value in (before, after))
        return "held-out reward", f"{_number(before)} before, {_number(after)} after"
    return "held-out loss", f"{_number(before)} before, {_number(after)} after"


def _worse(kind: str, before: float | None, after: float | None) -> list[tuple[str, str]]:
    """Say so if a stage did harm: a proven artifact is what was trained, not necessarily better than its start."""
    if before is None or after is None or not after > before:
        return []
    change = "reward fell" if kind == "grpo" else "loss rose"
    return [
        (
            "warning",
            f"the held-out {change} by {after - before:.4f}: on these rows the result is worse than the model the stage started from",
        )
    ]


def _speed(tokens_per_second: float | None) -> str:
    """None if the attempts that trained left no record."""
    return "unknown" if tokens_per_second is None else f"{tokens_per_second:,.0f} tokens/s (median of the steps)"


def _result_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Results of an evaluation or a merge."""
    made = (result["artifact"]["kind"].replace("_", " "), result["artifact"]["path"])
    match result["kind"]:
        case "evaluate" if "scores" not in result:  # of a classifier
            return [made, *(_describe_set(name, found) for name, found in result["sets"].items())]
        case "evaluate":
            base, tuned = result["scores"]["base"], result["scores"]["tuned"]
            scores = [(name, f"{base[name]:.4f} base, {value:.4f} tuned") for name, value in tuned.items()]
            return [made, *scores, ("", result["lost"])]
        case "interpolate":
            return [made, ("chosen", f"a={result['alpha']:g}, {result['why']}"), ("scores", result["curves"])]
        case "soup":
            return [made, ("soup of", ", ".join(result["members"])), ("scores", result["curves"])]
        case _:
            merged = (
                f"{result['kl']:.2e} nats per token from the trained model, same next token {result['agreement']:.2%}"
            )
            return [made, ("merged", f"into the {result['way']}: {merged}")]


def _describe_set(name: str, scores: dict[str, Any]) -> tuple[str, str]:
    """Results of a classifier on one set."""
    numbers = [f"{key} {value:.4f}" for key, value in scores.items() if isinstance(value, float)]
    return name + (" (shift)" if scores["shift"] else ""), f"{scores['rows']} rows: {', '.join(numbers)}"


def _judged(result: dict[str, Any]) -> list[tuple[str, str]]:
    """A classifier's metrics and its confusion matrix."""
    scores = result.get("classification")
    if scores is None or scores["held_out"] is None:
        return []
    held = scores["held_out"]
    numbers = [f"{name} {value:.4f}" for name, value in held.items() if isinstance(value, float) and name != "loss"]
    rows = [("held-out rows", f"{held['rows']}: {', '.join(numbers)}")]
    if "confusion" in held and len(scores["names"]) <= SHOWN_CLASSES:
        rows += [
            ("confusion" if index == 0 else " ", text)
            for index, text in enumerate(_matrix(scores["names"], held["confusion"]))
        ]
    return rows


def _matrix(names: Sequence[str], counts: Sequence[Sequence[int]]) -> list[str]:
    """A confusion matrix with names on both axes; long names are truncated in the header, where columns would get too
    wide.
    """
    left = max(len(AXES), *map(len, names))
    heads = [name if len(name) <= WIDEST_COLUMN else name[: WIDEST_COLUMN - 1] + "~" for name in names]
    widths = [max(5, len(head)) for head in heads]
    head = " ".join(f"{name:>{width}}" for name, width in zip(heads, widths, strict=True))
    rows = [
        f"{name:<{left}} " + " ".join(f"{count:>{width}}" for count, width in zip(row, widths, strict=True))
        for name, row in zip(names, counts, strict=True)
    ]
    return [f"{AXES:<{left}} {head}", *rows]


def _loading(result: dict[str, dict[str, str]], folder: Path) -> list[str]:
    """Not indented, so that the lines can be pasted."""
    artifact, base = result["artifact"], result["base"]
    return loading_lines(str(folder), kind=ArtifactKind(artifact["kind"]), base=base["folder"], folder=folder)


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"
