"""Compares runs: differing keys, results, and whether the losses are comparable. Must not import torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from orchestrator.config.base import JsonValue, flatten
from orchestrator.errors import ConfigError
from orchestrator.monitoring.run_facts import StageFacts, stage_facts
from orchestrator.monitoring.stage_status import find_runs, stage_statuses
from orchestrator.run_folder.folder import RunFolder
from orchestrator.run_state.freeze import read_config

NOT_COMPARED = ("name", "output_dir", "study")
"""Keys that differ between any two runs without effect on the result."""
MISSING = "(no such key)"


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """One run: its leaves of the configuration, and the facts of its stages."""

    label: str
    folder: Path
    keys: Mapping[str, JsonValue]
    pipeline: tuple[str, ...]
    stages: Mapping[str, StageFacts]


@dataclass(frozen=True, kw_only=True)
class RunComparison:
    """Two or more runs."""

    runs: tuple[ComparedRun, ...]
    differing: tuple[str, ...]
    """Keys whose values differ between runs."""
    warnings: tuple[str, ...]
    """Why losses are not comparable."""

    def to_json(self) -> dict[str, Any]:
        return {
            "runs": [
                {
                    "run": run.label,
                    "folder": str(run.folder),
                    "stages": {name: asdict(facts) for name, facts in run.stages.items()},
                }
                for run in self.runs
            ],
            "keys": {key: {run.label: run.keys.get(key) for run in self.runs} for key in self.differing},
            "warnings": list(self.warnings),
        }


def runs_to_compare(folders: Sequence[Path]) -> list[RunFolder]:
    """The runs of the folders, without duplicates; a folder of runs means all of them. ConfigError names what is no
    run.
    """
    found: dict[Path, RunFolder] = {}
    for folder in folders:
        runs = find_runs(folder.resolve()) if folder.is_dir() else []
        if not runs:
            raise ConfigError(f"{folder} is not a run folder: neither run.json nor NAME/run.json is in it")
        found |= {run.root: run for run in runs}
    if len(found) < 2:
        only = next(iter(found), None)
        raise ConfigError(f"compare takes two runs or more, or a folder of runs; {only} is the only one")
    return list(found.values())


def compare_runs(runs: Sequence[RunFolder]) -> RunComparison:
    """The comparison; reads nothing but the run folders (and asks Slurm once about jobs of unfinished stages)."""
    statuses = stage_statuses(runs)
    labels = _labels(runs)
    compared: list[ComparedRun] = []
    for run in runs:
        config = read_config(run)
        own = [status for status in statuses if status.folder == run.root]
        compared.append(
            ComparedRun(
                label=labels[run.root],
                folder=run.root,
                keys=flatten(cast("JsonValue", config)),
                pipeline=tuple(status.stage for status in own),
                stages={status.stage: stage_facts(run.stage(status.stage), config, status) for status in own},
            )
        )
    damaged = [f"{sentence}; skipped" for status in statuses for sentence in status.damaged]
    return RunComparison(
        runs=tuple(compared), differing=tuple(_differing(compared)), warnings=(*damaged, *_warnings(compared))
    )


def value_text(value: JsonValue) -> str:
    """A value as an override would write it."""
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _labels(runs: Sequence[RunFolder]) -> dict[Path, str]:
    """The folder's name, with as much of its path as distinguishes it from others of that name."""
    labels: dict[Path, str] = {}
    for run in runs:
        depth = 1
        same = [other.root for other in runs if other.root != run.root]
        while any(other.parts[-depth:] == run.root.parts[-depth:] for other in same):
            depth += 1
        labels[run.root] = "/".join(run.root.parts[-depth:])
    return labels


def _differing(runs: Sequence[ComparedRun]) -> Iterator[str]:
    """Keys to compare, in configuration order, without those of stages that not every run has."""
    keys = list(dict.fromkeys(key for run in runs for key in run.keys))
    common = {name for name in runs[0].pipeline if all(name in run.pipeline for run in runs)}
    for key in keys:
        head, _, rest = key.partition(".")
        if head in NOT_COMPARED or (head == "stages" and rest.split(".")[0] not in common):
            continue
        if any(other.startswith(f"{key}.") for other in keys):  # an empty map in one run, a filled one in another
            continue
        if len({value_text(run.keys[key]) if key in run.keys else MISSING for run in runs}) > 1:
            yield key


def _warnings(runs: Sequence[ComparedRun]) -> Iterator[str]:
    """Why the losses of a stage are not comparable; nothing if its files do not record its inputs."""
    for name in dict.fromkeys(name for run in runs for name in run.stages):
        own = {run.label: run.stages[name] for run in runs if name in run.stages}
        if len(own) < 2:
            continue
        kinds = {facts.loss_kind for facts in own.values()}
        if len(kinds) > 1:
            yield f"{name}: the losses are of different kinds ({', '.join(sorted(kinds))}), so they cannot be compared"
            continue
        yield from _content_warnings(name, own)


def _content_warnings(name: str, own: Mapping[str, StageFacts]) -> Iterator[str]:
    unknown = [label for label, facts in own.items() if not facts.digests]
    if unknown:
        yield f"{name}: {', '.join(unknown)} recorded no digests, so whether the losses can be compared is unknown"
    reasons = {
        "tokenizer": "different tokenizers, so a loss per token means something else in each",
        "template": "different chat templates",
        "base": "different base models",
    }
    differing = [key for key in reasons if _differs([facts.digests.get(key) for facts in own.values()])]
    found = [reasons[key] for key in differing]
    # Rows are prepared with tokenizer and template: if those differ, the digest of the rows adds nothing.
    if not {"tokenizer", "template"} & set(differing) and _differs([facts.held_out for facts in own.values()]):
        found.append("different held-out rows, or the same ones prepared differently (max_length, packing)")
    if found:
        yield f"{name}: the losses are not comparable: {'; '.join(found)}"


def _differs(values: Sequence[str | None]) -> bool:
    """Whether the known values differ."""
    return len({value for value in values if value is not None}) > 1
