"""The classes of a classifier: their names, and the target of every prepared row. Must not know models."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orchestrator.config.classification import ClassifyStage, Problem
from orchestrator.data.prepared.folder import PreparedFolder
from orchestrator.data.prepared.meta import Meta
from orchestrator.dataloader.batch import Batch
from orchestrator.errors import ConfigError, DataError
from orchestrator.files.atomic import read_json

NO_CLASS = -1
"""Target of an unlabelled row in single-class problems."""
SHOWN_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The classes, in index order; a regression has none."""

    problem: Problem
    names: tuple[str, ...]

    @property
    def outputs(self) -> int:
        """Width of the head's output."""
        return len(self.names) if self.problem != "regression" else 1

    def in_words(self, logits_C: torch.Tensor) -> str:
        """The prediction as text: the class; all over one half, comma-joined (multi-label); the number (regression)."""
        match self.problem:
            case "single_label":
                return self.names[int(logits_C.argmax())]
            case "multi_label":
                return ", ".join(name for name, logit in zip(self.names, logits_C.tolist(), strict=True) if logit > 0)
            case "regression":
                return f"{float(logits_C[0]):g}"

    def settings(self) -> dict[str, Any]:
        """Their entries in a model's config.json, under transformers' names."""
        names = self.names or ("value",)
        kind = self.problem if self.problem == "regression" else f"{self.problem}_classification"
        return {
            "num_labels": self.outputs,
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
            "problem_type": kind,
        }


def classes_of(stage: ClassifyStage, meta: Meta, *, name: str) -> Classes:
    """The configured classes, or those found in the training rows. DataError if there are fewer than two."""
    if stage.problem == "regression":
        return Classes(problem="regression", names=())
    names = stage.labels if stage.labels is not None else meta.classes
    if len(names) < (2 if stage.problem == "single_label" else 1):
        what = f"the classes of the train rows are {', '.join(names) or 'none'}"
        raise DataError(
            f"stages.{name}.data: {what}, which leaves nothing to learn; give other rows, or type "
            f"stages.{name}.problem=regression where the labels are measured numbers"
        )
    return Classes(problem=stage.problem, names=names)


def read_classes(folder: Path) -> Classes:
    """The classes of a classifier folder, model or adapter, from its config.json."""
    settings = read_json(folder / "config.json")
    kind = settings["problem_type"]
    if kind == "regression":
        return Classes(problem="regression", names=())
    names = settings["id2label"]
    return Classes(
        problem=kind.removesuffix("_classification"), names=tuple(names[str(number)] for number in range(len(names)))
    )


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The targets of the documents of one prepared folder, D of them."""

    of_D: torch.Tensor
    """Class numbers (-1: no label); 0 and 1 for every class, D x C (NaN: no label); numbers (NaN: no label)."""
    has_label_D: torch.Tensor
    true_D: torch.Tensor
    """Class indices from the rows' own `true_label`; -1 if a row has none, or has no single class."""

    def labelled_in(self, rows: PreparedFolder, indices: Sequence[int]) -> float:
        """Number of labelled documents among these trainable rows."""
        return float(sum(self.has_label_D[_documents_of(rows, int(index))].sum() for index in indices))


def targets_of(rows: PreparedFolder, classes: Classes) -> Targets:
    """Raises DataError with the lines of rows whose label is not one of the classes, or does not fit the problem."""
    extras = [json.loads(line) for line in (rows.folder / "extras.jsonl").read_text(encoding="utf-8").splitlines()]
    faults: list[str] = []
    numbers = rows.unit_numbers.tolist()
    values: list[Any] = []
    for number, extra in zip(numbers, extras, strict=True):
        try:
            values.append(_target(extra["label"], classes))
        except ValueError as error:
            faults.append(f"line {number}: {error}")
            values.append(None)
    if faults:
        raise DataError([f"data: {len(faults)} rows have labels that do not fit", *faults[:SHOWN_ROWS]])
    has_label_D = torch.tensor([value is not None for value in values])
    true = [_number_of(extra.get("true_label"), classes.names) for extra in extras]
    return Targets(
        of_D=_tensor(values, classes),
        has_label_D=has_label_D,
        true_D=torch.tensor([NO_CLASS if number is None else number for number in true]),
    )


def same_classes(ours: Classes, theirs: Classes, *, stage: str, start: str) -> None:
    """Raise ConfigError if a trained head cannot be reused because the classes differ."""
    if ours != theirs:
        raise ConfigError(
            f"stages.{stage}: {ours.problem} over {list(ours.names)}, but {start}, which it starts from, learnt "
            f"{theirs.problem} over {list(theirs.names)}; type stages.{stage}.start_from=null, or give the same labels"
        )


def documents_of_batch(batch: Batch, known: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """Values for a batch's documents, in order, on its device; `known` looks them up by the rows' digest."""
    return known(batch.digest)[list(batch.document_ids)].to(batch.input_ids_BT.device)


def _documents_of(rows: PreparedFolder, index: int) -> list[int]:
    return rows.segment_documents[int(rows.row_offsets[index]) : int(rows.row_offsets[index + 1])].tolist()


def _target(label: Any, classes: Classes) -> Any:
    """None without a label; ValueError if it does not fit."""
    if label is None:
        return None
    match classes.problem:
        case "regression":
            if isinstance(label, (str, list)):
                raise ValueError(f"{label!r} is not a number, problem=regression requires one")
            return float(label)
        case "single_label":
            return _class_number(label, classes.names)
        case "multi_label":
            chosen = label if isinstance(label, list) else [label]
            return [_class_number(one, classes.names) for one in chosen]


def _class_number(label: Any, names: Sequence[str]) -> int:
    if isinstance(label, list):
        raise ValueError(f"{label!r} is a list; only problem=multi_label takes several classes per row")
    number = _number_of(label, names)
    if number is None:
        raise ValueError(f"{label!r} is none of the classes {', '.join(names)}")
    return number


def _number_of(label: Any, names: Sequence[str]) -> int | None:
    """Find a class by its name, else by its index."""
    text = str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)
    if text in names:
        return names.index(text)
    return label if isinstance(label, int) and 0 <= label < len(names) else None


def _tensor(values: Sequence[Any], classes: Classes) -> torch.Tensor:
    match classes.problem:
        case "single_label":
            return torch.tensor([NO_CLASS if value is None else value for value in values])
        case "regression":
            return torch.tensor([torch.nan if value is None else value for value in values], dtype=torch.float32)
        case "multi_label":
            whole = torch.zeros(len(values), len(classes.names))
            for row, value in enumerate(values):
                whole[row, value or []] = 1.0
                if value is None:
                    whole[row] = torch.nan
            return whole
