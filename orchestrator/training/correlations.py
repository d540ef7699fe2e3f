"""Correlations between two columns of numbers; pure numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]


def pearson(first_N: Floats, second_N: Floats) -> float | None:
    """Pearson's correlation in [-1, 1]; None if either column is constant, where it is undefined."""
    if np.ptp(first_N) == 0 or np.ptp(second_N) == 0:
        return None
    # scaled first: squares of very large or very small numbers would overflow or underflow
    first, second = (values / np.abs(values).max() for values in (first_N - first_N.mean(), second_N - second_N.mean()))
    value = float(first @ second / math.sqrt(float(first @ first) * float(second @ second)))
    return max(-1.0, min(1.0, value))


def spearman(first_N: Floats, second_N: Floats) -> float | None:
    """Pearson's correlation of the ranks."""
    return pearson(ranks_of(first_N), ranks_of(second_N))


def ranks_of(values_N: npt.NDArray[Any]) -> Floats:
    """Ranks from 1; equal values share the mean of theirs."""
    _, group_of, sizes = np.unique(values_N, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[group_of]
