"""Explains arguments without an equals sign where overrides are expected. Must not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from orchestrator.composition.overrides import TOP_GROUPS, choices_of
from orchestrator.run_folder.folder import RUN_FILE, RunFolder

_ROWS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz")


def bare_argument_problem(text: str, roots: Sequence[Path]) -> str | None:
    """A sentence for a bare experiment, group choice, run folder or file of rows; else None."""
    if not text or "=" in text or text.startswith(("+", "~")):
        return None
    if text in choices_of("experiment", roots):
        return f"{text} is not an override; did you mean +experiment={text}?"
    groups = [group for group in TOP_GROUPS if text in choices_of(group, roots) and text != "none"]
    if groups:
        return f"{text} is not an override; did you mean {' or '.join(f'{group}={text}' for group in groups)}?"
    path = Path(text).expanduser()
    run = path.parent if path.name == RUN_FILE else path
    if RunFolder(run).is_run:
        return f"{text} is a run, not an override; type resume {run} to continue it, or config {run} to see its keys"
    if path.is_file() and path.name.endswith(_ROWS):
        return f"{text} is not an override; did you mean stages.sft.data.train.path={text}?"
    if path.is_file():
        return f"{text} is not an override; an experiment file ends in .yaml"
    return None
