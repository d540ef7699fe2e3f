"""Prepared rows as batches of tensors; nothing is tokenised here; must not import transformers or `launchers`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch

from orchestrator.dataset.prepared import PreparedFolder

IGNORED = -100
"""Label of a position that is not a target."""


@dataclass(frozen=True, slots=True)
class Span:
    """Where a document stands in a batch: tokens start..stop of sequence `sequence`."""

    sequence: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch. B sequences of T tokens, padded on the right; D documents (a pair has two: chosen, then rejected)."""

    input_ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    """-100 where nothing is learnt, else the token of the same position: the loss shifts by one, as in transformers."""
    attention_mask_BT: torch.Tensor | None
    """1 on real tokens; None where nothing is padded, or rows are packed."""
    position_ids_BT: torch.Tensor | None
    """Restart with every document of a packed row; None where every sequence is one document."""
    documents: tuple[Span, ...]
    values_D: torch.Tensor
    """Margin, label or class of each document's row; NaN where there is none."""
    row_ids: tuple[tuple[int, ...], ...]
    """Source rows of each trainable row; empty for a filler."""
    num_tokens: int
    """Real tokens, padding and fillers left out."""
    num_trained_tokens: int
    """Targets after the causal shift."""

    def to(self, device: torch.device | str) -> Self:
        """The batch on a device; what is on it already stays."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        return type(self)(
            input_ids_BT=move(self.input_ids_BT),
            labels_BT=move(self.labels_BT),
            attention_mask_BT=None if self.attention_mask_BT is None else move(self.attention_mask_BT),
            position_ids_BT=None if self.position_ids_BT is None else move(self.position_ids_BT),
            documents=self.documents,
            values_D=move(self.values_D),
            row_ids=self.row_ids,
            num_tokens=self.num_tokens,
            num_trained_tokens=self.num_trained_tokens,
        )


class PreparedRows(PreparedFolder):
    """A prepared folder that makes batches. `rows`, `lengths`, `trained_tokens`, `digest` and `row_ids` describe its rows."""

    pad_to_multiple_of: int = 1

    @classmethod
    def open(cls, folder: Path, *, pad_to_multiple_of: int = 1) -> Self:
        """Maps a folder that `ensure_prepared` made. Raises DataError where it is not one."""
        rows = cls(folder)
        rows.pad_to_multiple_of = pad_to_multiple_of
        return rows

    @property
    def is_packed(self) -> bool:
        """Whether a row holds several documents."""
        return self.meta.packing != "none"

    def batch(self, indices: Sequence[int]) -> Batch:
        """The batch of these trainable rows; -1 is a filler: one token, nothing to learn."""
        sequences, row_ids = self._sequences([int(index) for index in indices])
        longest = max(sum(stop - start for _, start, stop in sequence) for sequence in sequences)
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(sequences), width)
        ids = np.full(shape, self.meta.pad_id, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        spans: list[Span] = []
        values: list[float] = []
        num_tokens = 0
        for b, sequence in enumerate(sequences):
            place = 0
            for document, start, stop in sequence:
                end = place + stop - start
                positions[b, place:end] = np.arange(stop - start)
                mask[b, place:end] = 1
                if document >= 0:
                    self._fill(ids[b, place:end], labels[b, place:end], document, start, stop)
                    spans.append(Span(b, place, end))
                    values.append(float(self.values[document]))
                    num_tokens += stop - start
                place = end
            positions[b, place:] = np.arange(width - place)
        is_padded = bool((mask == 0).any())
        return Batch(
            input_ids_BT=torch.from_numpy(ids),
            labels_BT=torch.from_numpy(labels),
            attention_mask_BT=torch.from_numpy(mask) if is_padded and not self.is_packed else None,
            position_ids_BT=torch.from_numpy(positions) if self.is_packed else None,
            documents=tuple(spans),
            values_D=torch.tensor(values, dtype=torch.float32),
            row_ids=row_ids,
            num_tokens=num_tokens,
            num_trained_tokens=int((labels[:, 1:] != IGNORED).sum()),
        )

    def _sequences(self, indices: list[int]) -> tuple[list[list[tuple[int, int, int]]], tuple[tuple[int, ...], ...]]:
        """The segments of every sequence of a batch; a pair that is not packed makes two sequences."""
        sequences: list[list[tuple[int, int, int]]] = []
        apart = self.meta.kind == "pair" and not self.is_packed
        for index in indices:
            segments = [(-1, 0, 1)] * (2 if apart else 1) if index < 0 else self._segments(index)
            sequences += [[segment] for segment in segments] if apart else [segments]
        return sequences, tuple(self.row_ids(index) for index in indices)

    def _segments(self, index: int) -> list[tuple[int, int, int]]:
        part = slice(int(self.row_offsets[index]), int(self.row_offsets[index + 1]))
        columns = (self.segment_documents[part], self.segment_starts[part], self.segment_stops[part])
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def _fill(self, ids: np.ndarray, labels: np.ndarray, document: int, start: int, stop: int) -> None:
        base = int(self.document_offsets[document])
        tokens = self.tokens[base + start : base + stop].astype(np.int64)
        ids[:] = tokens
        labels[:] = np.where(self.trained[base + start : base + stop], tokens, IGNORED)
        labels[0] = IGNORED
