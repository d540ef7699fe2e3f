"""Traced coefficients of activations, and their value for a model and a batch; must not import torch.

`benchmarks/trace_memory.py` writes the files. A moment of a forward or backward pass is a polynomial in the model's dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

from pydantic import TypeAdapter

from orchestrator.architecture.families import FAMILIES
from orchestrator.config.model import Architecture

FOLDER = Path(__file__).parent / "coefficients"
TRACED_LAYERS = 2

Polynomial = dict[str, tuple[float, float]]
"""Monomial such as `N.h` -> bytes at two layers, more bytes for each further layer."""


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Moments that can be a peak; bytes in addition to parameters and gradients."""

    kept: Polynomial
    """What waits for backward when the logits are made, with the logits."""
    forward: tuple[Polynomial, ...]
    backward: tuple[Polynomial, ...]
    """Through the head and the last layer."""
    bottom: tuple[Polynomial, ...]
    """Through the first layer and the embedding."""
    evaluation: tuple[Polynomial, ...]
    """Forward without gradients."""


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A file of coefficients."""

    versions: dict[str, str]
    modes: dict[str, int]
    tables: tuple[Moments, ...]


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """The values of the monomials' parts, and the layers."""

    layers: int
    values: Mapping[str, float]
    logits_rows: float
    """Rows of the vocabulary's width that are there at a time; fewer than the tokens where the loss goes in chunks."""


@cache
def traced(family: str) -> Traced:
    """The coefficients of a family, read once."""
    return TypeAdapter(Traced).validate_json((FOLDER / f"{family}.json").read_bytes())


def moments_of(model: Architecture, mode: str) -> Moments:
    """The moments of one way to train; where a way was not traced, those of its nearest relative, which take no less."""
    found = traced(model.model_type if model.model_type in FAMILIES else "llama")
    tuning, precision, attention, checkpointing = mode.split("/")
    others = ("masked", "eager") if attention == "sdpa" else ("eager",)
    for path in (attention, *others):
        for width in (precision, "autocast", "bfloat16"):
            key = f"{tuning}/{width}/{path}/{checkpointing}"
            if key in found.modes:
                return found.tables[found.modes[key]]
    raise AssertionError(f"{model.model_type}: {mode} was not traced")


def value(polynomial: Polynomial, at: Dimensions) -> float:
    """Bytes of a moment."""
    return sum(
        (base + slope * (at.layers - TRACED_LAYERS)) * _product(monomial, at)
        for monomial, (base, slope) in polynomial.items()
    )


def peak(moments: Iterable[Polynomial], at: Dimensions) -> float:
    return max(value(moment, at) for moment in moments)


def _product(monomial: str, at: Dimensions) -> float:
    if monomial == "N.V":
        return at.logits_rows * at.values["V"]
    if not monomial:
        return 1.0
    parts = monomial.split(".")
    whole = prod(at.values[part] for part in parts)
    return whole * at.values["T"] / at.values["N"] if parts.count("N") == 2 else whole
