"""Types, ranges and rules of the stages that classify texts. Must not import torch."""

from __future__ import annotations

from typing import Literal

from orchestrator.config.base import Fraction, NaturalFloat, PositiveFloat, PositiveInt, Text
from orchestrator.config.training import TrainingStage


class ClassifyStage(TrainingStage):
    """Train a new head on labelled texts or pairs of texts."""

    kind: Literal["classify"]
    problem: Literal["single_label", "multi_label", "regression"]
    """One class of several, any number of classes at once, or a number (regression)."""
    labels: tuple[Text, ...] | None
    """Names of the classes in order; numeric labels in the data are 0-based indices into this list. Null collects them
    from the train rows."""


class SelfTrainingStage(TrainingStage):
    """COSINE (2010.07835): continue training a classifier on its own soft labels, over weakly labelled and unlabelled
    rows.
    """

    kind: Literal["self_training"]
    period: PositiveInt
    """Optimizer steps between two pseudo-labelling passes over all train rows (T3)."""
    threshold: Fraction
    """Least confidence 1 - entropy / log C of a pseudo-label that is trained on (xi)."""
    contrastive_weight: NaturalFloat
    """Weight of the contrastive term over pairs of a micro-batch (lambda); 0 leaves it out."""
    margin: PositiveFloat
    """Margin: features of two classes repel each other up to this distance (gamma)."""
    confidence_weight: NaturalFloat
    """Weight of KL(uniform || prediction), which discourages overconfident predictions; 0 leaves it out."""


CLASSIFIER_KINDS = ("classify", "self_training")
"""Stages that make a classifier."""


def classification_problems(field: str, stage: ClassifyStage | SelfTrainingStage) -> list[str]:
    """One sentence for every broken rule across the stage's own settings; `field` is the stage's key."""
    data = stage.data
    problems: list[str] = []
    if data.packing == "split":
        problems.append(
            f"{field}.data.packing: split would cut a text, and its class belongs to the whole text; type {field}.data.packing=none"
        )
    if data.eval.unlabelled == "keep":
        problems.append(
            f"{field}.data.eval.unlabelled: a row without a label cannot be scored; type drop or refuse, not keep"
        )
    if isinstance(stage, SelfTrainingStage):
        if data.eval.path == "none":
            problems.append(
                f"{field}.data.eval.path: without held-out rows it is unknown whether self-training helps; give a labelled file"
            )
        return problems
    if data.train.unlabelled == "keep":
        problems.append(
            f"{field}.data.train.unlabelled: stage=classify learns from labels alone; type drop, or give these rows to "
            "stage=self_training"
        )
    return problems + _label_problems(field, stage)


def _label_problems(field: str, stage: ClassifyStage) -> list[str]:
    if stage.labels is None:
        return []
    if stage.problem == "regression":
        return [f"{field}.labels: problem=regression predicts a number and has no classes; type {field}.labels=null"]
    problems: list[str] = []
    if len(set(stage.labels)) != len(stage.labels):
        problems.append(f"{field}.labels: a name appears twice in {list(stage.labels)}")
    if len(stage.labels) < 2 and stage.problem == "single_label":
        problems.append(f"{field}.labels: one class of {list(stage.labels)} is always right; give at least two")
    return problems


Problem = Literal["single_label", "multi_label", "regression"]
