"""Versions of the packages that decide what a run computes. Must not import any of them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata

TRAINING_PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "safetensors")
"""What a checkpoint depends on."""
RUN_PACKAGES = (*TRAINING_PACKAGES, "datasets", "tokenizers", "wandb")
"""What a run folder records."""
KNOWN_PACKAGES = (*RUN_PACKAGES, "hydra-core", "gguf", "liger-kernel")
"""What `doctor` reports."""
OPTIONAL_PACKAGES = ("gguf", "liger-kernel")


def version_of(package: str) -> str | None:
    """The installed version; None if the package is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions_of(packages: Iterable[str]) -> dict[str, str | None]:
    """Each package with its version."""
    return {package: version_of(package) for package in packages}
