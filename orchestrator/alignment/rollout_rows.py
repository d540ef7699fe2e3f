"""Rollouts as rows of the training loop: made at their first step, whole on every rank, kept for checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from orchestrator.config.alignment import PolicyStage
from orchestrator.data.order import Indices, permutation, rank_slices
from orchestrator.dataloader.batch import Batch, batch_of
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.distributed.runtime import Runtime
from orchestrator.errors import CheckpointError
from orchestrator.files.atomic import sync_folder
from orchestrator.losses.token_logprobs import IGNORED
from orchestrator.schedule import rollout_steps, rollout_steps_per_epoch


@dataclass(frozen=True, kw_only=True)
class ScoredCompletion:
    """One completion with its prompt, and what was known of it before the first update."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    generator: tuple[float, ...]
    """Log-probability of each token as computed by the generator."""
    old: tuple[float, ...]
    """Log-probability of each token as computed by the trainer."""
    reference: tuple[float, ...]
    """Log-probability of each token under the reference policy; zeros if there is none."""
    entropy: float
    """Sum over the tokens of the entropy of their distributions."""
    is_finished: bool
    row: int
    """Source row of the prompt."""
    reward: float
    rewards: Mapping[str, float]
    advantage: float = 0.0


@dataclass(frozen=True, kw_only=True)
class PolicyBatch:
    """A micro-batch of sequences with the per-token values that the loss needs, aligned with its labels."""

    batch: Batch
    old_BT: torch.Tensor
    reference_BT: torch.Tensor
    advantages_B: torch.Tensor

    def to(self, device: torch.device | str) -> Self:
        return self._moved(self.batch.to(device), lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Self:
        return self._moved(self.batch.pinned(), torch.Tensor.pin_memory)

    def _moved(self, batch: Batch, move: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        return replace(
            self,
            batch=batch,
            old_BT=move(self.old_BT),
            reference_BT=move(self.reference_BT),
            advantages_B=move(self.advantages_B),
        )


class RolloutRows:
    """The sequences of the current rollout, as the loop's rows."""

    def __init__(self, *, pad_id: int) -> None:
        self._pad_id = pad_id
        self.number = -1
        self.sequences: list[ScoredCompletion] = []
        self.lengths: Indices = np.zeros(0, dtype=np.int64)
        self.trained_tokens: Indices = np.zeros(0, dtype=np.int64)

    def take(self, number: int, sequences: list[ScoredCompletion]) -> None:
        self.number, self.sequences = number, sequences
        self.trained_tokens = np.array([len(one.completion) for one in sequences], dtype=np.int64)
        self.lengths = self.trained_tokens + np.array([len(one.prompt) for one in sequences], dtype=np.int64)

    def documents_in(self, indices: Sequence[int]) -> int:
        return len(indices)

    def row_ids(self, index: int) -> tuple[int, ...]:
        """The source row of the sequence's prompt; empty for a filler."""
        return () if index < 0 or index >= len(self.sequences) else (self.sequences[index].row,)

    def batch(self, indices: Sequence[int]) -> PolicyBatch:
        """The micro-batch of these sequences; -1 is a filler."""
        chosen = [None if index < 0 else self.sequences[int(index)] for index in indices]
        batch = batch_of([_text(one) for one in chosen], [int(index) for index in indices], pad_id=self._pad_id)
        return PolicyBatch(
            batch=batch,
            old_BT=_aligned(batch, [() if one is None else one.old for one in chosen]),
            reference_BT=_aligned(batch, [() if one is None else one.reference for one in chosen]),
            advantages_B=torch.tensor([0.0 if one is None else one.advantage for one in chosen]),
        )


def _text(one: ScoredCompletion | None) -> tuple[np.ndarray, np.ndarray]:
    if one is None:
        return np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.bool_)
    ids = np.array([*one.prompt, *one.completion], dtype=np.int64)
    return ids, np.arange(len(ids)) >= len(one.prompt)


def _aligned(batch: Batch, values: Sequence[Sequence[float]]) -> torch.Tensor:
    """Each value at the position of its token."""
    aligned_BT = torch.zeros(batch.labels_BT.shape)
    for b, row in enumerate(values):
        aligned_BT[b, batch.labels_BT[b] != IGNORED] = torch.tensor(row, dtype=torch.float32)
    return aligned_BT


class RolloutOrder:
    """Which sequences each step trains on: every pass over a rollout takes all of them, shuffled, in global batches."""

    def __init__(self, stage: PolicyStage, *, prompts: int, seed: int) -> None:
        self._stage, self._seed = stage, seed
        self.steps = rollout_steps(stage)
        self.steps_per_epoch = rollout_steps_per_epoch(stage, prompts)

    def rollout(self, step_index: int) -> tuple[int, int]:
        """(number of the rollout, step within it) of step `step_index` (from 0)."""
        return divmod(step_index, self.steps)

    def epoch(self, step_index: int) -> int:
        return step_index // self.steps_per_epoch

    def global_batch(self, step_index: int) -> Indices:
        """Indices of the step's sequences in its rollout."""
        number, step = self.rollout(step_index)
        rollout, size = self._stage.rollout, self._stage.batch.global_size
        sequences = rollout.prompts * rollout.group_size
        turn, batch = divmod(step, sequences // size)
        order = permutation(sequences, self._seed, f"rollout:{number}:{turn}")
        return order[batch * size : (batch + 1) * size]

    def micro_batches(self, step_index: int, *, rank: int, world_size: int, micro_size: int) -> list[Indices]:
        return rank_slices(self.global_batch(step_index), rank=rank, world_size=world_size, micro_size=micro_size)


def prompts_of(rows: PreparedRows, stage: PolicyStage, number: int, seed: int) -> list[int]:
    """The prompts of a rollout: each epoch visits all once, in its own order; the last rollout is filled up."""
    size = stage.rollout.prompts
    per_epoch = -(-rows.rows // size)
    epoch, index = divmod(number, per_epoch)
    order = permutation(rows.rows, seed, f"prompts:{epoch}")
    return [int(order[i % rows.rows]) for i in range(index * size, (index + 1) * size)]


def share(runtime: Runtime, mine: list[ScoredCompletion]) -> list[ScoredCompletion]:
    """The sequences of all ranks, in rank order."""
    if runtime.world_size == 1:
        return mine
    parts: list[Any] = [None] * runtime.world_size
    dist.all_gather_object(parts, [asdict(one) for one in mine])
    return [ScoredCompletion(**one) for part in parts for one in part]


def write_rollout(folder: Path, number: int, sequences: Sequence[ScoredCompletion], state: Mapping[str, Any]) -> None:
    """Save a whole rollout, so that a run stopped between its steps resumes with the same rows."""
    file = rollout_file(folder, number)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".partial")
    numbers = {
        name: torch.tensor([value for one in sequences for value in getattr(one, name)], dtype=dtype)
        for name, dtype in COLUMNS.items()
    }
    facts = [
        {"prompt": len(one.prompt), "completion": len(one.completion)}
        | {key: value for key, value in asdict(one).items() if key not in COLUMNS}
        for one in sequences
    ]
    save_file(numbers, temporary, metadata={"sequences": json.dumps(facts), "state": json.dumps(dict(state))})
    temporary.replace(file)
    sync_folder(folder)


COLUMNS = {
    "prompt": torch.int64,
    "completion": torch.int64,
    "generator": torch.float64,
    "old": torch.float64,
    "reference": torch.float64,
}


def read_rollout(folder: Path, number: int) -> tuple[list[ScoredCompletion], dict[str, Any]]:
    """A saved rollout and its state; CheckpointError if it is gone."""
    file = rollout_file(folder, number)
    try:
        with safe_open(file, framework="pt") as content:
            facts: list[dict[str, Any]] = json.loads(content.metadata()["sequences"])
            state: dict[str, Any] = json.loads(content.metadata()["state"])
            columns = {name: content.get_tensor(name).tolist() for name in COLUMNS}
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file} is required to resume between two steps of a rollout: {error}") from error
    offsets = dict.fromkeys(COLUMNS, 0)
    sequences: list[ScoredCompletion] = []
    for fact in facts:
        values: dict[str, Any] = {}
        for name in COLUMNS:
            length = fact["prompt"] if name == "prompt" else fact["completion"]
            values[name] = tuple(columns[name][offsets[name] : offsets[name] + length])
            offsets[name] += length
        sequences.append(ScoredCompletion(**{**fact, **values}))
    return sequences, state


def rollout_file(folder: Path, number: int) -> Path:
    return folder / f"rollout-{number:08d}.safetensors"


def forget_rollouts(folder: Path, *, before: int) -> None:
    """Remove rollouts that no checkpoint can need any more."""
    for file in folder.glob("rollout-*.safetensors"):
        if int(file.stem.rsplit("-", 1)[1]) < before:
            file.unlink(missing_ok=True)
