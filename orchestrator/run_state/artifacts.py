"""The artifact of an earlier stage, from its result.json, and whether a later stage can use it.

Must not import torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config.run import RunConfig
from orchestrator.errors import ConfigError
from orchestrator.files.atomic import read_json
from orchestrator.files.manifest import MANIFEST, file_digest
from orchestrator.run_folder.folder import RunFolder
from orchestrator.run_state.artifact_kind import ArtifactKind
from orchestrator.run_state.content_digests import SHARED


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """The proven artifact of a finished stage."""

    stage: str
    path: Path
    kind: ArtifactKind
    digest: str
    """sha256 of its manifest."""
    base: str
    report: Mapping[str, Any] | None
    """A reward model's report on held-out pairs."""
    content: Mapping[str, str]
    """Digests of its inputs; empty if an older version made it."""

    @property
    def is_reward(self) -> bool:
        return self.kind.startswith("reward_")


def read_artifact(run: RunFolder, stage: str) -> Artifact:
    """The artifact of a stage; ConfigError if the stage is not done, or its artifact is not the proven one."""
    file = run.stage(stage).result
    if not file.exists():
        raise ConfigError(f"{stage} is not done: there is no {file}; run the earlier stages first")
    result = read_json(file)
    recorded = result["artifact"]
    path = run.stage(stage).artifact  # wherever the run folder is now
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise ConfigError(
            f"{path}: the artifact that {stage} proved is missing; restore it, or retrain with --from {stage}"
        )
    if file_digest(manifest) != recorded["manifest_sha256"]:
        raise ConfigError(
            f"{path} is not the artifact that {stage} proved: its {MANIFEST} changed since; restore the old files, or train "
            f"it again with --from {stage}, which keeps the current files under superseded/"
        )
    return Artifact(
        stage=stage,
        path=path,
        kind=ArtifactKind(recorded["kind"]),
        digest=recorded["manifest_sha256"],
        base=result["base"]["name"],
        report=result.get("reward_report"),
        content=result.get("digests", {}),
    )


def check_artifacts(
    config: RunConfig, name: str, artifacts: Mapping[str, Artifact], *, content: Mapping[str, str] | None = None
) -> None:
    """Raise ConfigError with a sentence for every artifact that does not fit the stage that reads it.

    `content` are the digests of the stage's own inputs, if its base is on this machine.
    """
    problems = [problem for artifact in artifacts.values() for problem in _problems(config, artifact)]
    problems += [
        problem for artifact in artifacts.values() for problem in _other_content(name, artifact, content or {})
    ]
    if config.stages[name].requires_proven_rewards:
        problems += [problem for artifact in artifacts.values() for problem in _weakness(name, artifact)]
    if problems:
        raise ConfigError(problems)


def _other_content(name: str, artifact: Artifact, content: Mapping[str, str]) -> Iterator[str]:
    for what in SHARED:
        there, here = artifact.content.get(what), content.get(what)
        if there is not None and here is not None and there != here:
            yield (
                f"{artifact.stage}: its artifact was made with another {what} ({there[:12]}) than {name} has ({here[:12]}); "
                f"restore the old {what}, or type --from {artifact.stage}"
            )


def _weakness(name: str, artifact: Artifact) -> Iterator[str]:
    report = artifact.report
    if report is not None and not report["beats_chance"]:
        interval = f"{report['accuracy']:.2f} ({report['accuracy_low']:.2f} to {report['accuracy_high']:.2f})"
        yield (
            f"{artifact.stage}: its accuracy on {report['pairs']} held-out pairs is {interval}, which does not beat chance; train "
            f"it longer or on more pairs, or type stages.{name}.accept_weak_reward=true"
        )


def _problems(config: RunConfig, artifact: Artifact) -> Iterator[str]:
    if artifact.base != config.model.base:
        yield f"{artifact.stage}: its artifact was trained on {artifact.base}, this run's base is {config.model.base}"
    is_full = not config.tuning.is_adapter
    if is_full != artifact.kind.is_whole_model:
        wanted = "a full model" if is_full else "an adapter"
        yield f"{artifact.stage}: its artifact is of kind {artifact.kind}, tuning={config.tuning.method} expects {wanted}"
