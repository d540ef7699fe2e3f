"""Scores of a classifier on several sets: its own measures on each, next to the majority-class baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from orchestrator.classification.classes import Classes, read_classes
from orchestrator.classification.model import open_classifier, refuse_other_rows
from orchestrator.classification.report import class_report, first_targets
from orchestrator.config.evaluation import FIRST_SET, EvaluateStage
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.distributed.runtime import Runtime
from orchestrator.evaluation.set_scores import field_of
from orchestrator.models.loading import DTYPES
from orchestrator.run_state.stage_context import StageContext

HEADINGS = ("rows", "loss", "accuracy", "f1_macro", "mcc", "pearson", "mse")


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """A classifier's results on one set."""

    shift: bool
    report: Mapping[str, Any]
    """Rows, loss, measures, and the report of its problem (classes, confusion matrix)."""
    commonest: float | None
    """Share of the rows with the set's most frequent class; None if a row has no single class."""

    def to_json(self) -> dict[str, Any]:
        return {"shift": self.shift, **self.report, "commonest_class": self.commonest}


def classifier_scores(context: StageContext, runtime: Runtime) -> dict[str, ClassScores]:
    """Scores by set, `data` first, over the first `rows` rows. DataError if a set has no labels."""
    stage = cast("EvaluateStage", context.stage)
    assert context.start is not None, "the pipeline's rules ask for a start"
    dtype = DTYPES[context.config.model.dtype]
    classes = read_classes(context.start.folder)
    model = open_classifier(
        context.start.folder,
        context.config,
        base_folder=context.base_folder,
        weights_dtype=dtype,
        packed=False,
    )
    model = runtime.hold(model)
    shifts = stage.shifts
    sets = {name: PreparedRows.open(folder) for name, folder in {FIRST_SET: context.train_data, **context.sets}.items()}
    for name, rows in sets.items():
        refuse_other_rows(rows, field_of(context, name))
    return {
        name: _scores(runtime, model, classes, rows, stage=stage, shift=shifts[name], field=field_of(context, name))
        for name, rows in sets.items()
    }


def _scores(
    runtime: Runtime,
    model: torch.nn.Module,
    classes: Classes,
    rows: PreparedRows,
    *,
    stage: EvaluateStage,
    shift: bool,
    field: str,
) -> ClassScores:
    report = class_report(
        runtime, model, rows, classes=classes, micro_size=stage.micro_size, limit=stage.rows, field=field
    )
    commonest = None
    if classes.problem == "single_label":
        targets = first_targets(rows, classes, stage.rows)
        labels = targets.of_D[targets.has_label_D]
        commonest = float(labels.bincount().max()) / len(labels)
    return ClassScores(shift=shift, report=report, commonest=commonest)


def class_table(scores: Mapping[str, ClassScores]) -> list[str]:
    """Lines of a Markdown table: a row per set, a column per measure of its problem."""
    first = next(iter(scores.values())).report
    measures = [name for name in HEADINGS if name in first]
    lines = [f"| set | {' | '.join(measures)} | most common class |", "|---|" + "---|" * (len(measures) + 1)]
    for name, one in scores.items():
        label = f"{name} (shift)" if one.shift else name
        cells = [str(one.report[key]) if key == "rows" else f"{one.report[key]:.3f}" for key in measures]
        baseline = "" if one.commonest is None else f"{one.commonest:.3f}"
        lines.append(f"| {label} | {' | '.join(cells)} | {baseline} |")
    return lines
