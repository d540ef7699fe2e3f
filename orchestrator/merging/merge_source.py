"""What is merged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from orchestrator.config.run import RunConfig
from orchestrator.run_state.artifact_kind import ArtifactKind


@dataclass(frozen=True, kw_only=True)
class Source:
    """An adapter with its base, or a full model that is only relocated."""

    config: RunConfig
    base_folder: Path
    artifact: Path
    kind: ArtifactKind

    @property
    def ways(self) -> tuple[str, ...]:
        """The methods of merging to be compared."""
        if self.config.quantization.is_4bit and self.kind is ArtifactKind.ADAPTER:
            return (DENSE, DEQUANTISED)
        return (DENSE,)


DENSE = "dense base"
"""Merge into the published base; added in fp32 and rounded once."""
DEQUANTISED = "dequantised 4-bit base"
"""Merge into the weights seen in training."""
