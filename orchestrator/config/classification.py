"""Types, ranges and rules of the stages that classify texts. Must not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from orchestrator.config.base import Fraction, NaturalFloat, PositiveFloat, PositiveInt, Text
from orchestrator.config.data import DataConfig
from orchestrator.config.stage import Product, RowKind
from orchestrator.config.training import TrainingStage

Problem = Literal["single_label", "multi_label", "regression"]


class ClassifyStage(TrainingStage):
    """Train a new head on labelled texts or pairs of texts."""

    kind: Literal["classify"]
    makes: ClassVar[Product | None] = "classifier"
    starts_from: ClassVar[tuple[Product, ...]] = ("policy", "classifier")
    auto_starts_from: ClassVar[tuple[Product, ...] | None] = ("policy",)
    row_kind: ClassVar[RowKind | None] = "class"
    has_new_head: ClassVar[bool] = True
    problem: Problem
    """One class of several, any number of classes at once, or a number (regression)."""
    labels: tuple[Text, ...] | None
    """Names of the classes in order; numeric labels in the data are 0-based indices into this list. Null collects them
    from the train rows."""

    @property
    def predicts_numbers(self) -> bool:
        return self.problem == "regression"

    def problems(self, name: str, *, ranks: int) -> Iterator[str]:
        field = f"stages.{name}"
        yield from _class_data_problems(field, self.data)
        if self.data.train.unlabelled == "keep":
            yield (
                f"{field}.data.train.unlabelled: stage=classify learns from labels alone; type drop, or give these rows to "
                "stage=self_training"
            )
        if self.labels is not None:
            yield from self._label_problems(field, self.labels)

    def _label_problems(self, field: str, labels: tuple[str, ...]) -> Iterator[str]:
        if self.predicts_numbers:
            yield f"{field}.labels: problem=regression predicts a number and has no classes; type {field}.labels=null"
            return
        if len(set(labels)) != len(labels):
            yield f"{field}.labels: a name appears twice in {list(labels)}"
        if len(labels) < 2 and self.problem == "single_label":
            yield f"{field}.labels: one class of {list(labels)} is always right; give at least two"


class SelfTrainingStage(TrainingStage):
    """COSINE (2010.07835): continue training a classifier on its own soft labels, over weakly labelled and unlabelled
    rows.
    """

    kind: Literal["self_training"]
    makes: ClassVar[Product | None] = "classifier"
    starts_from: ClassVar[tuple[Product, ...]] = ("classifier",)
    needs_start: ClassVar[bool] = True
    row_kind: ClassVar[RowKind | None] = "class"
    has_new_head: ClassVar[bool] = True
    compares_rows: ClassVar[bool] = True
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

    def problems(self, name: str, *, ranks: int) -> Iterator[str]:
        field = f"stages.{name}"
        yield from _class_data_problems(field, self.data)
        if self.data.eval.path == "none":
            yield f"{field}.data.eval.path: without held-out rows it is unknown whether self-training helps; give a labelled file"


def _class_data_problems(field: str, data: DataConfig) -> Iterator[str]:
    """Rules of every stage whose rows have classes."""
    if data.packing == "split":
        yield f"{field}.data.packing: split would cut a text, and its class belongs to the whole text; type {field}.data.packing=none"
    if data.eval.unlabelled == "keep":
        yield f"{field}.data.eval.unlabelled: a row without a label cannot be scored; type drop or refuse, not keep"
