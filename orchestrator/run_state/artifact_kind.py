"""What an artifact is, as result.json names it. Must not import torch."""

from __future__ import annotations

from enum import StrEnum

from orchestrator.errors import RunFolderError


class ArtifactKind(StrEnum):
    """What the folder `artifact/` of a finished stage holds."""

    MODEL = "model"
    ADAPTER = "adapter"
    REWARD_MODEL = "reward_model"
    REWARD_ADAPTER = "reward_adapter"
    CLASSIFIER_MODEL = "classifier_model"
    CLASSIFIER_ADAPTER = "classifier_adapter"
    MERGED = "merged"
    """A whole policy with an adapter merged into it, ready to publish."""
    REPORT = "report"
    """Scores, and no model."""

    @classmethod
    def _missing_(cls, value: object) -> ArtifactKind:
        raise RunFolderError(
            f"result.json names the artifact kind {value!r}; this version knows {', '.join(cls)}: a newer version wrote it, or the "
            "file was changed"
        )

    @property
    def is_adapter(self) -> bool:
        return self in (ArtifactKind.ADAPTER, ArtifactKind.REWARD_ADAPTER, ArtifactKind.CLASSIFIER_ADAPTER)

    @property
    def is_whole_model(self) -> bool:
        """Whether a later stage can continue from its weights alone."""
        return self in (ArtifactKind.MODEL, ArtifactKind.REWARD_MODEL, ArtifactKind.CLASSIFIER_MODEL)

    @property
    def is_classifier(self) -> bool:
        return self in (ArtifactKind.CLASSIFIER_MODEL, ArtifactKind.CLASSIFIER_ADAPTER)

    @property
    def is_reward(self) -> bool:
        return self in (ArtifactKind.REWARD_MODEL, ArtifactKind.REWARD_ADAPTER)

    @property
    def heading(self) -> str:
        """As a heading says it."""
        return "full model" if self is ArtifactKind.MODEL else self.value.replace("_", " ")
