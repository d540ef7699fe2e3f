"""The trials of a study, read from their run folders, and the files of a study. Must not import torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import __version__
from orchestrator.config.base import JsonValue
from orchestrator.config.run import RunConfig, training_pipeline, training_stages
from orchestrator.config.study import NoStudy, SearchStudy, SeedsStudy, judged_stage
from orchestrator.errors import ConfigError
from orchestrator.files.atomic import read_json, write_json
from orchestrator.metrics.jsonl import Row, Tail, number_of, read_rows, step_of
from orchestrator.run_folder.folder import RunFolder
from orchestrator.run_state.attempts import read_attempts
from orchestrator.run_state.freeze import check_writable, refuse_differences, refuse_inside_a_run
from orchestrator.run_state.resume_rules import may_differ

MAY_GROW = frozenset({"study.num_trials", "study.max_failures", "study.weights", "study.data"})
BESIDE_METRICS = ("eval_seconds", "eval_trained_tokens")


@dataclass(frozen=True)
class StudyFolder:
    """The files of one study; its trials are separate runs next to it."""

    root: Path

    @property
    def record(self) -> Path:
        """Definition of the study, frozen before its first trial."""
        return self.root / "study.json"

    @property
    def report(self) -> Path:
        return self.root / "report.json"

    @property
    def table(self) -> Path:
        """The report for a person."""
        return self.root / "report.txt"

    @property
    def picture(self) -> Path:
        return self.root / "report.png"

    @property
    def journal(self) -> Path:
        """Optuna's journal of the search."""
        return self.root / "optuna.journal"

    def trial(self, name: str) -> RunFolder:
        return RunFolder(self.root.parent / name)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a study."""

    name: str
    values: Mapping[str, str]
    """The values that distinguish the trial, by key."""

    @property
    def overrides(self) -> list[str]:
        """The overrides that make it."""
        return [*(f"{key}={value}" for key, value in self.values.items()), f"name={self.name}"]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Status of a trial."""

    state: str
    """finished, stopped, failed, not ended."""
    why: str
    steps: int
    """Optimizer steps that were trained."""
    value: float | None
    """The metric of the finished trial's artifact."""
    values: Mapping[int, float]
    """The metric by step, from the intermediate evaluations; without step 0."""


def studied(config: RunConfig) -> SeedsStudy | SearchStudy:
    """The study of a configuration that has one."""
    assert not isinstance(config.study, NoStudy)
    return config.study


def studied_stage(config: RunConfig) -> str:
    """The stage that the study compares."""
    name = judged_stage(studied(config), training_pipeline(config))
    assert name is not None, "study_problems refuses it"
    return name


def study_folder(config: RunConfig) -> StudyFolder:
    """The folder of a study, next to its trials."""
    return StudyFolder(Path(config.output_dir) / f"{config.name}-study")


def as_trial(config: RunConfig, *, pause_at_step: int | None = None) -> RunConfig:
    """The configuration of one trial: an ordinary run whose compared stage pauses at the requested step."""
    name = studied_stage(config)
    stage = training_stages(config)[name]
    stages = config.stages
    if pause_at_step is not None:
        stages = {**stages, name: stage.model_copy(update={"pause_at_step": pause_at_step})}
    return config.model_copy(update={"study": NoStudy(kind="none"), "stages": stages})


def standing_of(folder: RunFolder, stage: str, metric: str) -> Standing:
    """The status of a trial from its files."""
    files = folder.stage(stage)
    rows = [row for row in read_rows(files.metrics) if "step" in row]  # a replayed step gives the same values
    found = {step_of(row): number_of(row, metric) for row in rows if "eval_loss" in row}
    values = {step: value for step, value in found.items() if value is not None and step}
    steps = max((step_of(row) for row in rows if "loss" in row), default=0)
    if files.result.exists():
        result: dict[str, Any] = read_json(files.result)
        made_at: int = result["best_step"] or result["steps"]
        made = next((value for step, value in values.items() if step == made_at), None)
        return Standing(state="finished", why="", steps=result["steps"], value=made, values=values)
    attempts = read_attempts(files) if files.attempts.is_dir() else []
    state, why = (attempts[-1].state, attempts[-1].why) if attempts else ("not ended", "")
    return Standing(state=state, why=why, steps=steps, value=None, values=values)


class WrongMetric(ConfigError):
    """The evaluations do not write the study's metric: no trial can be compared."""


def metric_watch(config: RunConfig) -> Callable[[str], bool]:
    """Never requests a stop; WrongMetric after the first evaluation of the compared stage if it lacks the metric."""
    study, judged = studied(config), studied_stage(config)
    tail = Tail(run_of(config).stage(judged).metrics)
    looked: list[bool] = []

    def watch(stage: str) -> bool:
        for row in tail.poll() if stage == judged and not looked else []:
            if "eval_loss" in row:
                looked.append(True)
                if study.metric not in row:
                    raise WrongMetric(_no_metric(study.metric, judged, row))
        return False

    return watch


def run_of(config: RunConfig) -> RunFolder:
    return RunFolder(Path(config.output_dir) / config.name)


def _no_metric(metric: str, stage: str, row: Row) -> str:
    there = ", ".join(key for key in row if key.startswith("eval_") and key not in BESIDE_METRICS)
    return f"study.metric: {metric} is not a result of {stage}'s evaluation; there are {there}"


def finite(value: float | None) -> float | None:
    """A number that JSON can represent."""
    return value if value is not None and math.isfinite(value) else None


def freeze_study(config: RunConfig, more: Mapping[str, JsonValue]) -> StudyFolder:
    """Write study.json, or check that the existing one is equal; lists of seeds and numbers of trials may change.

    `more` are the study's facts besides its configuration.
    """
    folder, stage = study_folder(config), studied_stage(config)
    record: dict[str, Any] = {
        "orchestrator": __version__,
        "stage": stage,
        "config": config.model_dump(mode="json"),
        **more,
    }
    refuse_inside_a_run(folder.root)
    check_writable(folder.root)
    if folder.record.exists():
        old: dict[str, Any] = read_json(folder.record)
        allowed = (may_differ(config) - {"study", f"stages.{stage}.evaluate_every_steps"}) | MAY_GROW
        if isinstance(config.study, SeedsStudy) and config.study.stopping is None:  # they only affect the report
            allowed |= {"study.metric", "study.mode", f"stages.{stage}.evaluate_every_steps"}
        refuse_differences(_asked(old), _asked(record), may_differ=allowed, folder=folder.root)
    write_json(folder.record, record)
    return folder


def _asked(record: Mapping[str, Any]) -> dict[str, JsonValue]:
    """What defines the trials: the configuration, and the space if there is one."""
    return {**record["config"], "space": {axis["key"]: axis for axis in record.get("axes", [])}}
