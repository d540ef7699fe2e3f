"""Prepared rows as a training loop reads them. Must not know models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch

from orchestrator.data.prepared.folder import PreparedFolder
from orchestrator.dataloader.batch import Batch, RolloutPrompt, Span, prompt_span
from orchestrator.losses.token_logprobs import IGNORED, labelled_positions

Segment = tuple[int, int, int]
"""Document (-1 for a filler), start and stop within it."""


class PreparedRows(PreparedFolder):
    """A prepared folder that makes batches. `rows`, `lengths`, `trained_tokens`, `digest` and `row_ids` describe it."""

    pad_to_multiple_of: int = 1

    @classmethod
    def open(cls, folder: Path, *, pad_to_multiple_of: int = 1) -> Self:
        """Map a folder that `ensure_prepared` made. Raises DataError if it is not one."""
        rows = cls(folder)
        rows.pad_to_multiple_of = pad_to_multiple_of
        return rows

    @property
    def is_packed(self) -> bool:
        """Whether a row may hold several documents."""
        return self.meta.packing != "none"

    def batch(self, indices: Sequence[int]) -> Batch:
        """The batch of these trainable rows; -1 is a filler: one token, nothing trained."""
        chosen = [int(index) for index in indices]
        sequences = self._sequences(chosen)
        longest = max(sum(stop - start for _, start, stop in sequence) for sequence in sequences)
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(sequences), width)
        ids = np.full(shape, self.meta.pad_id, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        spans: list[Span] = []
        prompts: list[Span] = []
        known: list[int] = []
        units: list[int] = []
        edges = [0]
        for b, sequence in enumerate(sequences):
            start_in_row = 0
            for document, start, stop in sequence:
                end = start_in_row + stop - start
                if document >= 0:
                    self._fill(ids[b, start_in_row:end], labels[b, start_in_row:end], document, start, stop)
                    spans.append(Span(b, start_in_row, end))
                    trained = self.trained[int(self.document_offsets[document]) + start :][: stop - start]
                    prompts.append(prompt_span(b, start_in_row, trained))
                    known.append(document)
                    units.append(self.unit_of(document))
                positions[b, start_in_row:end] = np.arange(end - start_in_row)
                mask[b, start_in_row:end] = 1
                edges.append(b * width + end)
                start_in_row = end
            if start_in_row < width:
                positions[b, start_in_row:] = np.arange(width - start_in_row)
                edges.append((b + 1) * width)
        return Batch(
            input_ids_BT=torch.from_numpy(ids),
            labels_BT=torch.from_numpy(labels),
            positions_K=labelled_positions(torch.from_numpy(labels)),
            attention_mask_BT=torch.from_numpy(mask) if not self.is_packed and bool((mask == 0).any()) else None,
            position_ids_BT=torch.from_numpy(positions) if self.is_packed else None,
            boundaries=torch.tensor(edges, dtype=torch.int32),
            longest=int(np.diff(edges).max()),
            documents=tuple(spans),
            values_D=torch.from_numpy(self.unit_values[units]) if units else torch.zeros(0),
            row_ids=tuple(self.row_ids(index) for index in chosen),
            num_tokens=sum(span.stop - span.start for span in spans),
            num_trained_tokens=int((labels[:, 1:] != IGNORED).sum()),
            document_ids=tuple(known),
            digest=self.digest,
            prompts=tuple(prompts),
        )

    def document_of(self, index: int) -> int:
        """The first document of a trainable row."""
        return int(self.segment_documents[int(self.row_offsets[index])])

    def document(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        """(token ids, trained mask) of a document."""
        span = slice(int(self.document_offsets[document]), int(self.document_offsets[document + 1]))
        return self.tokens[span].astype(np.int64), np.asarray(self.trained[span])

    def documents_in(self, indices: Sequence[int]) -> int:
        """Documents of these trainable rows; a preference pair has two."""
        return sum(int(self.row_offsets[index + 1] - self.row_offsets[index]) for index in indices)

    def prompt(self, index: int) -> RolloutPrompt:
        """The prompt of a row in a prompt set."""
        assert self.meta.kind == "prompt" and not self.is_packed
        document = self.document_of(index)
        extra = self.extra(self.unit_of(document))
        return RolloutPrompt(
            ids=tuple(self.document_ids(document).tolist()),
            row=self.row_ids(index)[0],
            extra=json.loads(extra) if extra else {},
        )

    def _sequences(self, indices: list[int]) -> list[list[Segment]]:
        """The segments of every sequence of a batch; an unpacked pair makes two sequences."""
        apart = self.meta.documents_per_unit if not self.is_packed else 1
        sequences: list[list[Segment]] = []
        for index in indices:
            segments = [(-1, 0, 1)] * apart if index < 0 else self._segments(index)
            sequences += [segments] if apart == 1 else [[segment] for segment in segments]
        return sequences

    def _segments(self, index: int) -> list[Segment]:
        part = slice(int(self.row_offsets[index]), int(self.row_offsets[index + 1]))
        columns = (self.segment_documents[part], self.segment_starts[part], self.segment_stops[part])
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def _fill(self, ids: np.ndarray, labels: np.ndarray, document: int, start: int, stop: int) -> None:
        base = int(self.document_offsets[document])
        tokens = self.tokens[base + start : base + stop].astype(np.int64)
        ids[:] = tokens
        labels[:] = np.where(self.trained[base + start : base + stop], tokens, IGNORED)
        labels[0] = IGNORED
