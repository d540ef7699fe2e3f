"""The further members of a soup or an interpolation, and whether they fit together. Must not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.config.run import POLICY_KINDS, RunConfig, Stage, made_kind
from orchestrator.errors import ConfigError, OrchestratorError, RunFolderError
from orchestrator.files.manifest import MANIFEST
from orchestrator.run_folder.folder import RunFolder
from orchestrator.run_state.frozen import load_config


@dataclass(frozen=True, kw_only=True)
class ExternalMember:
    """A finished stage of another run."""

    run: RunFolder
    stage: str
    config: RunConfig
    """As that stage saw it."""


def read_member(member: str) -> ExternalMember:
    """The finished stage of another run that a member names. ConfigError if there is none."""
    folder, stage = _place(member)
    if not RunFolder(folder).is_run:
        raise ConfigError(f"{member}: not a run folder (run.json expected); give FOLDER, FOLDER:STAGE or stage:NAME")
    run = RunFolder(folder)
    try:
        config = load_config(run)
    except RunFolderError as error:
        raise ConfigError([f"{member}: {problem}" for problem in error.problems]) from None
    policies = [name for name in config.pipeline if made_kind(config, name) in POLICY_KINDS]
    wanted = stage or (policies[-1] if policies else "")
    if wanted not in policies:
        raise ConfigError(
            f"{member}: {wanted or 'it'} makes no policy; its stages that do are {', '.join(policies) or 'none'}"
        )
    if not run.stage(wanted).result.exists():
        raise ConfigError(f"{member}: {wanted} is not done: there is no {run.stage(wanted).result}")
    return ExternalMember(run=run, stage=wanted, config=config.for_stage(wanted))


def manifests_elsewhere(stage: Stage) -> list[Path]:
    """The manifest of every member from another run, as it was when the soup was built."""
    found = [read_member(member) for member in stage.external_members]
    return [one.run.stage(one.stage).artifact / MANIFEST for one in found]


def blend_problems(config: RunConfig) -> list[str]:
    """Incompatibilities between the members of a resolved configuration's soups; reads other runs' folders."""
    return [problem for name in config.pipeline if name in config.stages for problem in _member_problems(config, name)]


def _member_problems(config: RunConfig, name: str) -> Iterator[str]:
    field = f"stages.{name}.members"
    ours = config.for_stage(name)
    for member in config.stages[name].external_members:
        try:
            theirs = read_member(member).config
        except OrchestratorError as error:
            yield from (f"{field}: {problem}" for problem in error.problems)
            continue
        pairs = {
            "model.base": (theirs.model.base, ours.model.base),
            "model.dtype": (theirs.model.dtype, ours.model.dtype),
            "quantization": (theirs.quantization.scheme, ours.quantization.scheme),
        }
        both_whole = all(not one.tuning.is_adapter for one in (theirs, ours))
        if not both_whole:
            pairs["tuning.method"] = (theirs.tuning.method, ours.tuning.method)
        if not both_whole and theirs.tuning.method == ours.tuning.method:
            pairs |= {
                f"tuning.{key}": (str(value), str(ours.tuning.model_dump()[key]))
                for key, value in theirs.tuning.model_dump().items()
            }
        for key, (one, other) in pairs.items():
            if one != other:
                yield f"{field}: {member} has {key} {one}, this run {other}; members of a soup must share base and tuning"


def _place(member: str) -> tuple[Path, str]:
    """(folder of the run, name of the stage or empty)."""
    if Path(member).is_dir():
        return Path(member), ""
    folder, _, stage = member.rpartition(":")
    return Path(folder or member), stage if folder else ""
