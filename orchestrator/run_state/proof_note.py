"""What the proof of an artifact must reproduce, in proof.json: written with the artifact, read by fresh ranks.

While its state is `written`, the artifact awaits its proof: every later start of the stage goes on with that alone.
Must not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from orchestrator.files.atomic import read_json, write_json
from orchestrator.files.manifest import MANIFEST, file_digest
from orchestrator.run_folder.folder import StageFolder
from orchestrator.run_state.artifact_kind import ArtifactKind
from orchestrator.run_state.stage_context import StageContext

State = Literal["written", "proven", "failed"]


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The score of the model in memory on rows that the proof scores again, and how to score them."""

    data: Path
    """Prepared rows."""
    rows: int
    loss: float
    micro_size: int
    autocast: bool
    """Whether 16-bit forward passes ran over fp32 weights."""


@dataclass(frozen=True, kw_only=True)
class ProofNote:
    """The content of proof.json."""

    state: State
    data: str
    rows: int
    loss: float
    micro_size: int
    autocast: bool
    base_folder: str
    world_size: int
    """Number of ranks that wrote the artifact."""
    digest: str
    """Identity of the stage's result: an artifact of other settings is not proven for these."""
    manifest_sha256: str
    kind: ArtifactKind
    summary: dict[str, Any] = field(default_factory=dict[str, Any])
    """What result.json says of the work before the proof."""
    reopened_loss: float | None = None
    problems: tuple[str, ...] = ()
    """Why the proof failed."""


def write_note(
    context: StageContext, expected: Expected, *, kind: ArtifactKind, summary: Mapping[str, Any], world_size: int
) -> None:
    """Note that the artifact is written; from here on the stage has nothing to do but to prove it."""
    note = ProofNote(
        state="written",
        data=str(expected.data),
        rows=expected.rows,
        loss=expected.loss,
        micro_size=expected.micro_size,
        autocast=expected.autocast,
        base_folder=str(context.base_folder),
        world_size=world_size,
        digest=context.digest,
        manifest_sha256=file_digest(context.folder.artifact / MANIFEST),
        kind=kind,
        summary=dict(summary),
    )
    write_json(context.folder.proof, asdict(note))


def read_note(folder: StageFolder) -> ProofNote:
    """The note of a stage. RunFolderError if it is missing or damaged."""
    values: dict[str, Any] = read_json(folder.proof)
    values |= {"kind": ArtifactKind(values["kind"]), "problems": tuple(values["problems"])}
    return ProofNote(**values)


def awaits_proof(folder: StageFolder, digest: str) -> bool:
    """Whether an artifact of an unfinished stage with this digest is written, and no proof of it has failed."""
    if not folder.proof.exists() or read_json(folder.proof).get("state") not in ("written", "proven"):
        return False  # older versions noted no state
    return read_note(folder).digest == digest


def close_note(folder: StageFolder, *, reopened_loss: float | None = None, problems: tuple[str, ...] = ()) -> None:
    """Note the outcome of the proof. After a failure the next start makes the artifact again."""
    state: State = "failed" if problems else "proven"
    note = replace(read_note(folder), state=state, reopened_loss=reopened_loss, problems=problems)
    write_json(folder.proof, asdict(note))
