"""Prepared rows as batches of tensors; nothing is tokenised here; must not import transformers or `launchers`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch

from orchestrator.losses.token_logprobs import IGNORED, labelled_positions


@dataclass(frozen=True, slots=True)
class Span:
    """Position of a document in a batch: tokens start..stop of sequence `sequence`."""

    sequence: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch. B sequences of T tokens, padded on the right; D documents (two per pair: chosen, rejected)."""

    input_ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    """-100 where nothing is trained, else the token at this position: the loss shifts by one, as in transformers."""
    positions_K: torch.Tensor
    """Positions of the trained tokens in the flattened labels: made here, since asking a GPU would wait for it."""
    attention_mask_BT: torch.Tensor | None
    """1 on real tokens; None without padding or for packed rows. A causal model does not need it (`model_inputs`)."""
    position_ids_BT: torch.Tensor | None
    """Restart with every document of a packed row; None if every sequence is one document."""
    boundaries: torch.Tensor
    """int32: starts of documents (and of padding) in the B concatenated sequences, and the end of the last."""
    longest: int
    """Tokens of the longest stretch between two boundaries."""
    documents: tuple[Span, ...]
    values_D: torch.Tensor
    """Margin, label or class index of each document's row; NaN if there is none."""
    row_ids: tuple[tuple[int, ...], ...]
    """Source rows of each trainable row; empty for a filler."""
    num_tokens: int
    """Real tokens, without padding and fillers."""
    num_trained_tokens: int
    """Targets after the causal shift."""
    document_ids: tuple[int, ...] = ()
    """Index of each document in its prepared folder."""
    digest: str = ""
    """Of the prepared folder."""
    prompts: tuple[Span, ...] = ()
    """The tokens before the first trained one of each document; the whole document if nothing is trained."""

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments for a causal model.

        No mask: with padding on the right no real token can see any, and without a mask every attention takes its
        fast path. Packed rows pass restarting positions and, for kernels over documents, their boundaries. No cache:
        with one, transformers ignores the positions, and the documents of a packed row see each other.
        """
        if self.position_ids_BT is None:
            return {"input_ids": self.input_ids_BT, "use_cache": False}
        return {
            "input_ids": self.input_ids_BT,
            "use_cache": False,
            "position_ids": self.position_ids_BT,
            "cu_seq_lens_q": self.boundaries,
            "cu_seq_lens_k": self.boundaries,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
        }

    def to(self, device: torch.device | str) -> Self:
        """The batch on a device; tensors already there stay."""
        # Asynchronous only from pinned memory; from other memory the call waits.
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Self:
        """The batch in pinned memory, from which a GPU copies without the host waiting."""
        return self._moved(torch.Tensor.pin_memory)

    def _moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        return replace(
            self,
            input_ids_BT=move(self.input_ids_BT),
            labels_BT=move(self.labels_BT),
            positions_K=move(self.positions_K),
            attention_mask_BT=None if self.attention_mask_BT is None else move(self.attention_mask_BT),
            position_ids_BT=None if self.position_ids_BT is None else move(self.position_ids_BT),
            boundaries=move(self.boundaries),
            values_D=move(self.values_D),
        )


@dataclass(frozen=True, slots=True)
class RolloutPrompt:
    """A prompt to generate from, and what a reward may need of its row."""

    ids: tuple[int, ...]
    row: int
    extra: dict[str, Any]


def prompt_span(sequence: int, start: int, trained: np.ndarray) -> Span:
    """The tokens before the first trained one of a document that begins at `start`."""
    length = int(np.argmax(trained)) if np.any(trained) else len(trained)
    return Span(sequence, start, start + length)


def batch_of(
    texts: Sequence[tuple[np.ndarray, np.ndarray]], document_ids: Sequence[int], *, digest: str = "", pad_id: int = 0
) -> Batch:
    """Single documents, given as (ids, trained mask), padded on the right; a document of -1 is a filler."""
    width = max(len(ids) for ids, _ in texts)
    ids_BT = torch.full((len(texts), width), pad_id, dtype=torch.int64)
    labels_BT = torch.full((len(texts), width), IGNORED, dtype=torch.int64)
    mask_BT = torch.zeros((len(texts), width), dtype=torch.int64)
    edges = [0]
    for b, (ids, trained) in enumerate(texts):
        row = torch.from_numpy(ids)
        ids_BT[b, : len(ids)] = row
        labels_BT[b, : len(ids)] = torch.where(torch.from_numpy(trained), row, IGNORED)
        mask_BT[b, : len(ids)] = 1
        edges += [b * width + len(ids)] + ([(b + 1) * width] if len(ids) < width else [])
    # Nothing precedes the first token of a document that could predict it.
    labels_BT[:, 0] = IGNORED
    real = [b for b, document in enumerate(document_ids) if document >= 0]
    return Batch(
        input_ids_BT=ids_BT,
        labels_BT=labels_BT,
        positions_K=labelled_positions(labels_BT),
        attention_mask_BT=mask_BT if bool((mask_BT == 0).any()) else None,
        position_ids_BT=None,
        boundaries=torch.tensor(edges, dtype=torch.int32),
        longest=int(np.diff(edges).max()),
        documents=tuple(Span(b, 0, len(texts[b][0])) for b in real),
        values_D=torch.full((len(real),), torch.nan),
        row_ids=tuple(() if document < 0 else (document,) for document in document_ids),
        num_tokens=sum(len(texts[b][0]) for b in real),
        num_trained_tokens=int((labels_BT[:, 1:] != IGNORED).sum()),
        document_ids=tuple(document_ids[b] for b in real),
        digest=digest,
        prompts=tuple(prompt_span(b, 0, texts[b][1]) for b in real),
    )
