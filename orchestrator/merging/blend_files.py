"""Weighted sums of whole models as a stream: a layer of each is in memory, read from its files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from orchestrator.config.run import RunConfig
from orchestrator.errors import CheckpointError
from orchestrator.models.artifact_stream import ReadParameters
from orchestrator.models.loading import DTYPES
from orchestrator.models.model_files import ModelFiles


class BlendFiles:
    """Reads the parameters of a blend. Holds the last layer of each ingredient."""

    def __init__(self, base: ModelFiles | None, folders: Sequence[Path], ingredients: Sequence[ModelFiles]) -> None:
        """Without a base the first ingredient replaces it, and weights add up to 1. CheckpointError if they differ."""
        refuse_others(folders, [one.shapes for one in ingredients])
        self._ingredients = ingredients
        self._base, self._has_base = base or ingredients[0], base is not None
        self._weights: Sequence[float] = ()

    @classmethod
    def of_models(cls, config: RunConfig, base: Path, folders: Sequence[Path]) -> BlendFiles:
        """Language models in `model.dtype`, and their base."""
        dtype = DTYPES[config.model.dtype]
        first, *others = (ModelFiles(AutoModelForCausalLM, folder, dtype=dtype) for folder in (base, *folders))
        return cls(first, folders, others)

    @classmethod
    def of_classifiers(cls, config: RunConfig, folders: Sequence[Path]) -> BlendFiles:
        dtype = DTYPES[config.model.dtype]
        files = [ModelFiles(AutoModelForSequenceClassification, folder, dtype=dtype) for folder in folders]
        return cls(None, folders, files)

    @property
    def parameters(self) -> ReadParameters:
        """What an artifact of the blend holds."""
        first = self._ingredients[0]
        return ReadParameters(module=first.module, names=first.names, read=self.read)

    def weigh(self, weights: Sequence[float]) -> None:
        """Give the ingredients these weights, in order, and the base the remainder."""
        assert self._has_base or math.isclose(sum(weights), 1.0), f"there is no base to take the rest of {weights}"
        self._weights = weights

    def read(self, name: str) -> torch.Tensor:
        """A parameter of the blend, on the host."""
        return weighted(self._base.read(name), [one.read(name) for one in self._ingredients], self._weights)


def weighted(base: torch.Tensor, ingredients: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """base + sum_i w_i (ingredient_i - base) in fp32; bit-exact for one weight of 1 among zeros, or all equal."""
    if list(weights).count(0.0) == len(weights) - 1 and 1.0 in weights:
        return ingredients[list(weights).index(1.0)]
    start = base.float()
    return start + sum(
        weight * (ingredient.float() - start) for ingredient, weight in zip(ingredients, weights, strict=True) if weight
    )


def refuse_others(folders: Sequence[Path], facts: Sequence[Mapping[str, Any]]) -> None:
    """Raise CheckpointError if the names of an ingredient's parameters, or what is known of them, differ from the first's."""
    first = facts[0]
    for folder, own in zip(folders, facts, strict=True):
        different = sorted(own.keys() ^ first.keys())
        different += [name for name in own.keys() & first.keys() if own[name] != first[name]]
        if different:
            raise CheckpointError(
                f"{folder}: it does not have the parameters of the others ({', '.join(different[:3])}); members of a "
                "soup must share base and tuning"
            )
