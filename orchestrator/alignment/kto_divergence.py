"""KTO's KL estimate: the policy's log-ratio on answers paired with other prompts. One extra forward pass per step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from orchestrator.alignment.reference_logprobs import keep_reference
from orchestrator.data.order import rank_slices
from orchestrator.dataloader.batch import Batch, batch_of
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.errors import DataError
from orchestrator.run_state.stage_context import training_stage
from orchestrator.training.objectives import document_logprobs
from orchestrator.training.recipe import Session


class Mismatched:
    """Prompts of prepared rows, each with the next row's answer; a fixed pairing, so that a reference can be kept."""

    def __init__(self, rows: PreparedRows) -> None:
        if rows.is_packed or rows.rows < 2:
            raise DataError("loss=kto needs at least two rows that are not packed: set data.packing=none")
        self._rows = rows
        self.rows = rows.rows
        self.digest = f"{rows.digest}-mismatched"
        self.document_offsets = rows.document_offsets

    def batch(self, indices: Sequence[int]) -> Batch:
        """The batch of these rows' mismatched documents; -1 is a filler."""
        documents = [-1 if index < 0 else self._rows.document_of(index) for index in indices]
        return batch_of([self._mixed(document) for document in documents], documents, digest=self.digest)

    def _mixed(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, trained mask) of a document's prompt with the next document's answer."""
        if document < 0:
            return np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.bool_)
        ids, trained = self._rows.document(document)
        other_ids, other_trained = self._rows.document((document + 1) % (len(self.document_offsets) - 1))
        prompt, answer = ids[~trained], other_ids[other_trained]
        return np.concatenate([prompt, answer]), np.arange(len(prompt) + len(answer)) >= len(prompt)


class Divergence:
    """The mean log-ratio over the mismatched answers of a step's global batch; the same on every rank."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._rows = Mismatched(session.rows)
        self._reference = keep_reference(session, [self._rows])
        self._value = 0.0

    def value(self) -> float:
        """The estimate of the last measured step, clamped to at least 0."""
        return self._value

    @torch.no_grad()
    def measure(self, indices: np.ndarray) -> Mapping[str, float]:
        """Measure a step; every rank calls it."""
        runtime, model = self._session.runtime, self._session.model
        micro_size = training_stage(self._session.context).batch.micro_size
        slices = rank_slices(indices, rank=runtime.rank, world_size=runtime.world_size, micro_size=micro_size)
        total = 0.0
        was_training = model.training
        model.eval()
        for chosen in slices:
            batch = self._rows.batch(chosen.tolist()).to(runtime.device)
            logprobs_D, _ = document_logprobs(runtime, model, batch)
            total += float((logprobs_D.cpu() - self._reference.of(batch)).sum())
        model.train(was_training)
        real = int((indices >= 0).sum())
        self._value = max(0.0, runtime.sum_over_ranks([total])[0] / real)
        return {"kl": self._value}
