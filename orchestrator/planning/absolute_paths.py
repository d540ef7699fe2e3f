"""Makes every path of a configuration absolute and replaces `auto` starts by stage names. Must not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from orchestrator.architecture.base_model import looks_like_folder
from orchestrator.config.data import DataConfig, SourceConfig
from orchestrator.config.demonstration import DEMONSTRATIONS
from orchestrator.config.evaluation import ScoringStage
from orchestrator.config.functions import FunctionSource
from orchestrator.config.merging import SoupStage
from orchestrator.config.pipeline import resolve_starts
from orchestrator.config.rollout import MODEL_PREFIX, STAGE_PREFIX, RewardSource
from orchestrator.config.run import RunConfig, Stage
from orchestrator.config.training import TrainingStage

AnyFunction = TypeVar("AnyFunction", bound=FunctionSource)


KEYWORDS = (*DEMONSTRATIONS, "auto", "none")


def resolve(config: RunConfig, working_folder: Path) -> RunConfig:
    """The same configuration with absolute paths, so that no rank depends on the user's working folder."""
    config = resolve_starts(config)
    stages = {name: _resolved_stage(stage, working_folder) for name, stage in config.stages.items()}
    base = config.model.base
    if looks_like_folder(base):
        base = str(_absolute(base, working_folder))
    return config.model_copy(
        update={
            "output_dir": str(_absolute(config.output_dir, working_folder)),
            "stages": stages,
            "model": config.model.model_copy(update={"base": base}),
        }
    )


def _resolved_stage(stage: Stage, working_folder: Path) -> Stage:
    data = stage.data
    update = {
        "train": _resolved_source(data.train, working_folder),
        "mix": tuple(_resolved_source(source, working_folder) for source in data.mix),
        "eval": data.eval.model_copy(update={"path": _resolved_path(data.eval.path, working_folder)}),
        "chat_template": None if data.chat_template is None else str(_absolute(data.chat_template, working_folder)),
    }
    changes: dict[str, object] = {"data": DataConfig.model_copy(data, update=update)}
    if isinstance(stage, TrainingStage):
        functions = tuple(_resolved_function(function, working_folder) for function in stage.metrics.functions)
        changes["metrics"] = stage.metrics.model_copy(update={"functions": functions})
        changes["callbacks"] = tuple(_resolved_function(function, working_folder) for function in stage.callbacks)
    if stage.reward_sources:
        changes["rewards"] = tuple(_resolved_reward(reward, working_folder) for reward in stage.reward_sources)
    if isinstance(stage, ScoringStage):
        changes["sets"] = {
            name: entry.model_copy(update={"path": _resolved_path(entry.path, working_folder)})
            for name, entry in stage.sets.items()
        }
    if isinstance(stage, SoupStage):
        changes["members"] = tuple(
            member if member.startswith(STAGE_PREFIX) else str(_absolute(member, working_folder))
            for member in stage.members
        )
    return stage.model_copy(update=changes)


def _resolved_reward(reward: RewardSource, working_folder: Path) -> RewardSource:
    """Make files of functions and folders of models absolute."""
    if not reward.source.startswith(MODEL_PREFIX):
        return _resolved_function(reward, working_folder)
    folder = _absolute(reward.source.removeprefix(MODEL_PREFIX), working_folder)
    return reward.model_copy(update={"source": f"{MODEL_PREFIX}{folder}"})


def _resolved_function(function: AnyFunction, working_folder: Path) -> AnyFunction:
    """Make a user's file absolute; keep the names of built-in functions."""
    if ".py:" not in function.source:
        return function
    file, _, name = function.source.rpartition(":")
    return function.model_copy(update={"source": f"{_absolute(file, working_folder)}:{name}"})


def _resolved_source(source: SourceConfig, working_folder: Path) -> SourceConfig:
    return source.model_copy(update={"path": _resolved_path(source.path, working_folder)})


def _resolved_path(path: str, working_folder: Path) -> str:
    """Make files absolute; keep keywords and hub ids (owner/name that is not a file)."""
    if path in KEYWORDS:
        return path
    absolute = _absolute(path, working_folder)
    is_file_like = (
        absolute.exists() or absolute.suffix or path.startswith((".", "/", "~")) or any(c in path for c in "*?[")
    )
    return str(absolute) if is_file_like or path.count("/") != 1 else path


def _absolute(path: str, working_folder: Path) -> Path:
    return Path(working_folder, Path(path).expanduser()).resolve()
