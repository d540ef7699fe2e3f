"""Soft labels that a classifier gives its own training rows: made once per period, kept in the stage's folder.

They are a function of the weights at the period's first step. Resuming at that step recomputes them; within the
period reads them, as the weights have changed since.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from orchestrator.classification.classes import NO_CLASS, Classes, Targets, documents_of_batch
from orchestrator.classification.objective import all_logits_DC
from orchestrator.config.classification import SelfTrainingStage
from orchestrator.dataloader.batch import Batch
from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.files.atomic import sync_folder
from orchestrator.losses.classification import confidences_D, soft_pseudo_labels_DC
from orchestrator.training.recipe import Session

NAME = "labels_DC"


class PseudoLabels:
    """Owns the labels of the current period. Every rank calls `begin` before every step."""

    def __init__(self, session: Session, stage: SelfTrainingStage, classes: Classes, targets: Targets) -> None:
        self._session, self._stage, self._classes, self._targets = session, stage, classes, targets
        self._first_step = 0
        """First step of the period whose labels are loaded; 0 before there are any."""
        self._labels_DC = torch.zeros(0, classes.outputs)
        self._weights_D = torch.zeros(0)
        self.periods: list[dict[str, float]] = []
        """Quality of the labels of each period of this attempt."""

    def before_step(self, step: int) -> Mapping[str, Any]:
        """Make or load the labels of a step (from 1); return their part of its row of metrics."""
        first = step - (step - 1) % self._stage.period
        if step == first:
            self._take(self._made(first), first)
            self._tell(first)
        elif first != self._first_step:
            self._take(self._read(first), first)
        quality = quality_of(self._labels_DC, self._weights_D, self._targets, threshold=self._stage.threshold)
        return {f"pseudo_{name}": value for name, value in quality.items()}

    def of(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(labels_DC, weights_D) of a batch's documents; a weight is 0 below the threshold."""
        labels_DC = documents_of_batch(batch, lambda _: self._labels_DC)
        weights_D = documents_of_batch(batch, lambda _: self._weights_D)
        return labels_DC, torch.where(weights_D >= self._stage.threshold, weights_D, 0.0)

    def _take(self, labels_DC: torch.Tensor, first: int) -> None:
        self._labels_DC, self._weights_D, self._first_step = labels_DC, confidences_D(labels_DC), first
        self._refuse_no_labels(first)

    def _refuse_no_labels(self, first: int) -> None:
        """Raise ConfigError if no row would be trained on from the first step; later, with work to keep, only warn."""
        highest, threshold = float(self._weights_D.max()), self._stage.threshold
        # A weight of 0 counts in no term of the loss, whatever the threshold; negated, so that NaN is refused too.
        if highest >= threshold and highest > 0:
            return
        sentence = (
            f"stages.{self._session.context.name}.threshold: {threshold:g}, but the most confident pseudo-label has {highest:.3g}, so "
            "nothing would be trained; lower it, or train the classifier before it longer"
        )
        if first == 1:
            raise ConfigError(sentence)
        self._session.record.log(f"warning: from step {first}: {sentence}")

    def _made(self, first: int) -> torch.Tensor:
        session = self._session
        logits_DC = all_logits_DC(
            session.runtime,
            session.model,
            session.rows,
            outputs=self._classes.outputs,
            micro_size=self._stage.batch.micro_size,
        )
        labels_DC = soft_pseudo_labels_DC(logits_DC.double().softmax(1)).float()
        if session.runtime.is_main:
            _write(labels_DC, self._file(first), data=session.rows.digest, step=first)
        session.runtime.barrier()
        return labels_DC

    def _read(self, first: int) -> torch.Tensor:
        return _read(self._file(first), data=self._session.rows.digest, step=first)

    def _file(self, first: int) -> Path:
        return self._session.context.folder.reference / f"pseudo-labels-{first:08d}.safetensors"

    def _tell(self, first: int) -> None:
        quality = quality_of(self._labels_DC, self._weights_D, self._targets, threshold=self._stage.threshold)
        self.periods.append({"step": first, **quality})
        self._session.record.event("pseudo_labels", step=first, **quality)
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in quality.items())
        self._session.record.log(f"pseudo-labels from step {first}: {shown}")


def quality_of(
    labels_DC: torch.Tensor, weights_D: torch.Tensor, targets: Targets, *, threshold: float
) -> dict[str, float]:
    """Share of the rows that are trained on; if true labels are known, the accuracy of all labels and of these."""
    kept_D = weights_D >= threshold
    quality = {"share_kept": float(kept_D.float().mean())}
    known_D = targets.true_D != NO_CLASS
    right_D = labels_DC.argmax(1) == targets.true_D
    if known_D.any():
        quality["accuracy"] = float(right_D[known_D].float().mean())
    if (known_D & kept_D).any():
        quality["accuracy_kept"] = float(right_D[known_D & kept_D].float().mean())
    return quality


def weak_label_quality(targets: Targets) -> dict[str, float]:
    """Share of the rows with a weak label, and if true labels are known the share of these that are right."""
    has_D, known_D = targets.has_label_D, targets.has_label_D & (targets.true_D != NO_CLASS)
    quality = {"coverage": float(has_D.float().mean())}
    if known_D.any():
        quality["accuracy"] = float((targets.of_D == targets.true_D)[known_D].float().mean())
    return quality


def _write(labels_DC: torch.Tensor, file: Path, *, data: str, step: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".partial")
    facts = {"data": data, "step": str(step), "sha256": _digest(labels_DC)}
    save_file({NAME: labels_DC}, temporary, metadata=facts)
    temporary.replace(file)
    sync_folder(file.parent)


def _read(file: Path, *, data: str, step: int) -> torch.Tensor:
    """Raise CheckpointError if the file is missing, damaged, or belongs to other rows."""
    try:
        with safe_open(file, framework="pt") as content:
            labels_DC, facts = content.get_tensor(NAME), content.metadata()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({' '.join(str(error).split())[:120]}), and the model that made its labels has been trained since: remove the newer "
            f"checkpoints to resume from one before step {step}, or restart the stage"
        ) from error
    if facts != {"data": data, "step": str(step), "sha256": _digest(labels_DC)}:
        raise CheckpointError(f"{file} is damaged or belongs to other rows: restart the stage without its checkpoints/")
    return labels_DC


def _digest(labels_DC: torch.Tensor) -> str:
    return hashlib.sha256(labels_DC.contiguous().numpy().tobytes()).hexdigest()
