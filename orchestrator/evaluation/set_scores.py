"""Scores of one model on named sets: accuracy, loss, exact match of answers, and the loss on a fixed general text."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch

from orchestrator.classification.classes import Classes, read_classes
from orchestrator.classification.model import refuse_other_rows
from orchestrator.classification.report import class_report
from orchestrator.config.demonstration import DEMONSTRATION
from orchestrator.config.evaluation import FIRST_SET, FORGETTING, Options, ScoringStage
from orchestrator.data.encoding.tokenizer import load_facts, load_tokenizer
from orchestrator.data.prepared.meta import Kind
from orchestrator.dataloader.batch import batch_of
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.distributed.runtime import Runtime
from orchestrator.errors import DataError
from orchestrator.evaluation.answer_options import AnswerOptions, answered_rows, choices_of, option_logprobs_RO
from orchestrator.generation.generator import Request, end_ids_of, make_generate
from orchestrator.generation.prompts import prompt_of
from orchestrator.run_state.stage_context import StageContext
from orchestrator.training.evaluation import evaluate
from orchestrator.training.objectives import prompt_objective, proof_objective

GENERAL_TEXT = DEMONSTRATION / "general_text.txt"
NO_GENERAL_TEXT = "set forgetting: skipped, a classifier has no loss on a text"
_LAST_MARKS = re.compile(r"[\s.!?]+$")


@dataclass(frozen=True, kw_only=True)
class SetScores:
    """A model's scores on one set; None if the set does not support the measure, or it was not requested."""

    rows: int
    loss: float
    """Nats per trained token; for pairs and other kinds, the measure of their stage's proof."""
    accuracy: float | None = None
    """Share of the rows whose correct option is the most likely."""
    exact_match: float | None = None
    """Share of the rows whose greedy answer equals the row's own, after `normalised`."""

    def to_json(self) -> dict[str, float | int | None]:
        return {
            "rows": self.rows,
            "loss": self.loss,
            "perplexity": math.exp(min(self.loss, 700.0)),
            "accuracy": self.accuracy,
            "accuracy_error": standard_error(self.accuracy, self.rows),
            "exact_match": self.exact_match,
        }


@dataclass(frozen=True, kw_only=True)
class OpenSet:
    """A set that can be scored repeatedly."""

    name: str
    rows: PreparedRows
    count: int
    shift: bool
    choices: AnswerOptions | None


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Everything that a stage scores models with."""

    context: StageContext
    runtime: Runtime
    sets: tuple[OpenSet, ...]
    classes: Classes | None = None
    """A classifier's classes; None for language models."""

    def of(self, model: torch.nn.Module) -> dict[str, SetScores]:
        """Scores by set, the general text last if the stage asks for it."""
        stage = cast("ScoringStage", self.context.stage)
        found = {one.name: scores_of(self, model, one) for one in self.sets}
        if stage.forgetting and self.classes is None:
            found[FORGETTING] = general_text_scores(self.context, self.runtime, model)
        return found


def open_scorer(context: StageContext, runtime: Runtime) -> Scorer:
    """Open every prepared set of the stage, and report its number of options. DataError if options do not fit.

    If the stage starts from a classifier, its classes are the options, and there is no general text to score.
    """
    classes = None
    if context.start is not None and context.start.kind.is_classifier:
        classes = read_classes(context.start.folder)
    stage = cast("ScoringStage", context.stage)
    facts = load_facts(context.base_folder)
    shifts = stage.shifts
    folders = {FIRST_SET: context.train_data, **context.sets}
    wanted: dict[str, Options] = {FIRST_SET: stage.options}
    wanted |= {name: entry.options for name, entry in stage.sets.items()}
    opened: list[OpenSet] = []
    for name, folder in folders.items():
        rows = PreparedRows.open(folder, pad_to_multiple_of=stage.data.pad_to_multiple_of)
        count = min(stage.rows, rows.rows)
        field = field_of(context, name)
        if classes is not None:
            refuse_other_rows(rows, field)
        choices = None if classes else choices_of(answered_rows(rows, count), wanted[name], facts, field=field)
        opened.append(OpenSet(name=name, rows=rows, count=count, shift=shifts[name], choices=choices))
    return Scorer(context=context, runtime=runtime, sets=tuple(opened), classes=classes)


def field_of(context: StageContext, name: str) -> str:
    """The key of a set in the configuration."""
    return f"stages.{context.name}" + ("" if name == FIRST_SET else f".sets.{name}")


def scores_of(scorer: Scorer, model: torch.nn.Module, one: OpenSet) -> SetScores:
    """A model's scores on a set, by the kind of its rows: the extension point for other kinds of models."""
    kind = one.rows.meta.kind
    if kind not in SCORERS or (kind == "class") != (scorer.classes is not None):
        raise DataError(
            f"stages.{scorer.context.name}: rows of format {one.rows.meta.format} have no answer on which a language model could be "
            "scored by; map the columns to instruction and output, with the class in words"
        )
    return SCORERS[kind](scorer, model, one)


def _text_scores(scorer: Scorer, model: torch.nn.Module, one: OpenSet) -> SetScores:
    exact = _exact_match(scorer, model, one)
    if one.choices is None:
        return SetScores(rows=one.count, loss=_loss(scorer, model, one), exact_match=exact)
    logprobs_RO = option_logprobs_RO(scorer.runtime, model, one.choices)
    right_R = torch.tensor(one.choices.right)
    tokens = sum(len(row.answer) for row in one.choices.rows)
    loss = -float(logprobs_RO.gather(1, right_R[:, None]).sum()) / tokens
    accuracy = float((logprobs_RO.argmax(1) == right_R).double().mean())
    return SetScores(rows=one.count, loss=loss, accuracy=accuracy, exact_match=exact)


def _prompt_scores(scorer: Scorer, model: torch.nn.Module, one: OpenSet) -> SetScores:
    return SetScores(rows=one.count, loss=_loss(scorer, model, one), exact_match=_exact_match(scorer, model, one))


def _loss_alone(scorer: Scorer, model: torch.nn.Module, one: OpenSet) -> SetScores:
    return SetScores(rows=one.count, loss=_loss(scorer, model, one))


def _class_scores(scorer: Scorer, model: torch.nn.Module, one: OpenSet) -> SetScores:
    """Scores of the labelled among the first rows; numeric predictions have only a loss."""
    assert scorer.classes is not None, "other rows were refused"
    stage = cast("ScoringStage", scorer.context.stage)
    report = class_report(
        scorer.runtime,
        model,
        one.rows,
        classes=scorer.classes,
        micro_size=stage.micro_size,
        limit=one.count,
        field=field_of(scorer.context, one.name),
    )
    return SetScores(rows=report["rows"], loss=report["loss"], accuracy=report.get("accuracy"))


SCORERS: Mapping[Kind, Callable[[Scorer, torch.nn.Module, OpenSet], SetScores]] = {
    "text": _text_scores,
    "prompt": _prompt_scores,
    "pair": _loss_alone,
    "feedback": _loss_alone,
    "class": _class_scores,
}


def _loss(scorer: Scorer, model: torch.nn.Module, one: OpenSet) -> float:
    stage = cast("ScoringStage", scorer.context.stage)
    objective = proof_objective(scorer.runtime, stage, one.rows.meta.kind)
    return evaluate(scorer.runtime, model, objective, one.rows, micro_size=stage.micro_size, limit=one.count).loss


def _exact_match(scorer: Scorer, model: torch.nn.Module, one: OpenSet) -> float | None:
    """None if it was not requested, or rows have no answer to compare with."""
    stage = cast("ScoringStage", scorer.context.stage)
    if not stage.exact_match:
        return None
    context, runtime = scorer.context, scorer.runtime
    rows = [prompt_of(context, one.rows, index) for index in range(one.count)]
    if not all(isinstance(row.get("answer"), str) and ids for ids, row in rows):
        return None
    asked = [rows[turn] for turn in runtime.turns(one.count) if turn is not None]
    ends, pad_id = end_ids_of(runtime.module_of(model), context.base_folder), one.rows.meta.pad_id
    generate = make_generate(runtime, model, end_ids=ends, pad_id=pad_id)
    completions = generate([Request(prompt=ids, seed=0) for ids, _ in asked], stage.rollout.greedy)
    tokenizer = load_tokenizer(context.base_folder)
    said = [tokenizer.decode(list(done.ids), skip_special_tokens=True) for done in completions]
    pairs = zip(said, asked, strict=True)
    same = sum(normalised(text) == normalised(row["answer"]) for text, (_, row) in pairs)
    return runtime.sum_over_ranks([same])[0] / one.count


def normalised(text: str) -> str:
    """NFKC, case-folded, whitespace runs joined, without trailing `.`, `!`, `?`: what exact match compares."""
    return _LAST_MARKS.sub("", " ".join(unicodedata.normalize("NFKC", text).casefold().split()))


def general_text_scores(context: StageContext, runtime: Runtime, model: torch.nn.Module) -> SetScores:
    """Loss per token of the fixed text, in pieces of at most `data.max_length` tokens."""
    stage = cast("ScoringStage", context.stage)
    core = load_tokenizer(context.base_folder)
    ids = torch.tensor(core.encode(GENERAL_TEXT.read_text(encoding="utf-8"), add_special_tokens=False).ids)
    pieces = [piece.numpy() for piece in ids.split(stage.data.max_length) if len(piece) > 1]
    terms = prompt_objective(runtime).terms
    model.eval()
    total = 0.0
    with torch.no_grad():
        for turn in runtime.turns(len(pieces)):
            piece = pieces[turn or 0]
            batch = batch_of([(piece, piece == piece)], [turn or 0])
            loss = float(terms(model, batch.to(runtime.device))[0])
            total += 0.0 if turn is None else loss
    (total,) = runtime.sum_over_ranks([total])
    return SetScores(rows=len(pieces), loss=total / sum(len(piece) - 1 for piece in pieces))


def standard_error(share: float | None, rows: int) -> float | None:
    """Standard error of a share of this many rows: sqrt(p (1-p) / n)."""
    return None if share is None else math.sqrt(share * (1 - share) / rows)
