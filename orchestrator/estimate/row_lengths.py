"""Row lengths of a stage: read from prepared data, or guessed from the size of its files. Must not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.data.prepared.statistics import PreparedFacts

BYTES_PER_TOKEN = 4.0
"""Bytes per token of English text under current tokenizers; surrounding JSON makes the guess a little too high."""
PACKED_SHARE = 0.98
"""Share of a packed row that is real, where nothing was packed yet (docs/data.md)."""


@dataclass(frozen=True, kw_only=True)
class RowShape:
    """The rows of a stage on average."""

    tokens: float
    """Real tokens of a row."""
    computed_tokens: float
    """Tokens that a forward pass computes for a row, padding included."""
    attended: float
    """sum(l^2) / sum(l) over what attention sees as one document."""
    source: Literal["prepared", "guessed", "longest"]


def shape_of(facts: PreparedFacts, *, micro_size: int, grouped: bool) -> RowShape:
    """From prepared lengths. Rows of a micro-batch are padded to its longest, unless batches group similar lengths."""
    tokens = facts.tokens / facts.rows
    padding = 1.0 if grouped else expected_longest(facts.row_lengths, micro_size) / _mean(facts.row_lengths)
    squares = sum(length * length for length in facts.document_lengths)
    return RowShape(
        tokens=tokens,
        computed_tokens=tokens * padding,
        attended=squares / sum(facts.document_lengths),
        source="prepared",
    )


def guessed_shape(*, file_bytes: int, rows: int | None, max_length: int, packed: bool) -> RowShape:
    """From the size of the files, four bytes a token; the longest rows where not even that is known."""
    if packed:
        return RowShape(
            tokens=PACKED_SHARE * max_length,
            computed_tokens=max_length,
            attended=min(max_length, file_bytes / BYTES_PER_TOKEN / rows) if rows and file_bytes else max_length,
            source="guessed" if rows and file_bytes else "longest",
        )
    if not rows or not file_bytes:
        return RowShape(tokens=max_length, computed_tokens=max_length, attended=max_length, source="longest")
    tokens = min(float(max_length), file_bytes / BYTES_PER_TOKEN / rows)
    return RowShape(tokens=tokens, computed_tokens=tokens, attended=tokens, source="guessed")


def guessed_packed_rows(file_bytes: int, max_length: int) -> int:
    """Packed rows that files of this size will make."""
    return max(1, round(file_bytes / BYTES_PER_TOKEN / (PACKED_SHARE * max_length)))


def expected_longest(lengths: Sequence[int], count: int) -> float:
    """Mean of the longest of `count` lengths drawn from these: sum of l_(i) x ((i/n)^count - ((i-1)/n)^count)."""
    n = len(lengths)
    return sum(
        length * ((i / n) ** count - ((i - 1) / n) ** count) for i, length in enumerate(sorted(lengths), start=1)
    )


def _mean(lengths: Sequence[int]) -> float:
    return sum(lengths) / len(lengths)
