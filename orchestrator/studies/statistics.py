"""Statistics of a few results: expected best of n, variance by source. Pure; standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Mode = Literal["min", "max"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One row of the table of variance."""

    name: str
    degrees: int
    """Degrees of freedom."""
    sum_of_squares: float
    share: float
    """Share of the total sum of squares; 0 if all results are equal."""
    mean_square: float | None
    """None without degrees of freedom."""
    f: float | None
    """Mean square divided by that of the residual; None if the residual has none, or it is 0."""
    deviation: float | None
    """Standard deviation of a result due to this source alone; 0 if the estimated variance is negative."""


def expected_best(values: Sequence[float], *, mode: Mode) -> list[float]:
    """Expected best of n = 1 ... len(values) results, each drawn from `values` with replacement (Dodge et al., 2002.06305).

    For the highest: sum_v v (P(V <= v)^n - P(V < v)^n) over the distinct values v; the lowest is its mirror.
    """
    sign = 1.0 if mode == "max" else -1.0
    ordered = sorted(sign * value for value in values)
    count = len(ordered)
    return [
        sign * math.fsum(v * (((i + 1) / count) ** n - (i / count) ** n) for i, v in enumerate(ordered))
        for n in range(1, count + 1)
    ]


def two_way(table: Sequence[Sequence[float]], *, rows: str, columns: str) -> list[Source]:
    """Two-way analysis of variance without replication, of a complete table with one result per cell: rows, columns and
    residual.

    y_ij = m + r_i + c_j + e_ij; with one result per cell, e contains both interaction and noise. The variance of r
    is (MS_r - MS_e) / columns, that of c (MS_c - MS_e) / rows, that of e MS_e (random effects).
    """
    height, width = len(table), len(table[0])
    whole = math.fsum(value for row in table for value in row) / (height * width)
    row_means = [math.fsum(row) / width for row in table]
    column_means = [math.fsum(row[j] for row in table) / height for j in range(width)]
    squares_rows = width * math.fsum((mean - whole) ** 2 for mean in row_means)
    squares_columns = height * math.fsum((mean - whole) ** 2 for mean in column_means)
    squares_rest = math.fsum(
        (table[i][j] - row_means[i] - column_means[j] + whole) ** 2 for i in range(height) for j in range(width)
    )
    total = squares_rows + squares_columns + squares_rest
    degrees = (height - 1) * (width - 1)
    rest = _Rest(total=total, mean_square=squares_rest / degrees if degrees else None)
    return [
        _source(rows, squares_rows, degrees=height - 1, repeats=width, rest=rest),
        _source(columns, squares_columns, degrees=width - 1, repeats=height, rest=rest),
        Source(
            name="interaction and noise",
            degrees=degrees,
            sum_of_squares=squares_rest,
            share=squares_rest / total if total else 0.0,
            mean_square=rest.mean_square,
            f=None,
            deviation=None if rest.mean_square is None else math.sqrt(rest.mean_square),
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class _Rest:
    """The residual that a source is compared with."""

    total: float
    mean_square: float | None


def _source(name: str, squares: float, *, degrees: int, repeats: int, rest: _Rest) -> Source:
    mean_square = squares / degrees if degrees else None
    deviation = ratio = None
    if mean_square is not None and rest.mean_square is not None:
        deviation = math.sqrt(max(0.0, (mean_square - rest.mean_square) / repeats))
        ratio = mean_square / rest.mean_square if rest.mean_square else None
    return Source(
        name=name,
        degrees=degrees,
        sum_of_squares=squares,
        share=squares / rest.total if rest.total else 0.0,
        mean_square=mean_square,
        f=ratio,
        deviation=deviation,
    )


def standard_deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation (divided by n - 1); None for fewer than two values."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def best_first(values: Sequence[tuple[str, float]], *, mode: Mode) -> list[str]:
    """Names from the best value to the worst; equal values keep their order, and non-numbers come last."""
    sign = 1.0 if mode == "min" else -1.0
    return [name for name, _ in sorted(values, key=lambda pair: math.inf if math.isnan(pair[1]) else sign * pair[1])]
