"""The return type of `load`: a model with its tokenizer.

Must not import torch, so that the login side may name the type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.config.run import RunConfig
from orchestrator.run_state.artifact_kind import ArtifactKind


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """The proven artifact of a stage, in evaluation mode."""

    model: Any
    """A transformers model, or a PEFT model around one."""
    tokenizer: Any
    """With the chat template of training."""
    stage: str
    kind: ArtifactKind
    """`model` or `adapter`, optionally prefixed with `reward_` or `classifier_`."""
    config: RunConfig
