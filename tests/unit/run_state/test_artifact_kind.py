"""An artifact kind that this version does not know is one sentence in every verb."""

from __future__ import annotations

import pytest

from orchestrator.errors import RunFolderError
from orchestrator.run_state.artifact_kind import ArtifactKind


def test_an_unknown_kind_is_named_with_those_that_are_known() -> None:
    with pytest.raises(RunFolderError, match="'hologram'; this version knows model, adapter, reward_model"):
        ArtifactKind("hologram")


def test_kinds_say_what_they_are() -> None:
    assert {kind for kind in ArtifactKind if kind.is_adapter} == {"adapter", "reward_adapter", "classifier_adapter"}
    assert {kind for kind in ArtifactKind if kind.is_whole_model} == {"model", "reward_model", "classifier_model"}
    assert not ArtifactKind.MERGED.is_whole_model and not ArtifactKind.REPORT.is_adapter
