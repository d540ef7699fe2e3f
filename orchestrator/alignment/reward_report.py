"""The report on a trained reward model: its scores of held-out pairs against length and bag-of-words baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from orchestrator.alignment.reward_statistics import Pairs, RewardReport, report_of
from orchestrator.config.alignment import RewardStage
from orchestrator.data.encoding.tokenizer import load_tokenizer
from orchestrator.dataloader.passes import passes
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.run_state.stage_context import training_stage
from orchestrator.training.objectives import document_scores
from orchestrator.training.recipe import Session


def held_out_scores(session: Session) -> np.ndarray:
    """The score of every held-out document (of every training document if nothing is held out); every rank calls it."""
    rows = session.held or session.rows
    runtime, model = session.runtime, session.model
    micro_size = training_stage(session.context).batch.micro_size
    scores_D = [0.0] * (len(rows.document_offsets) - 1)
    was_training = model.training
    model.eval()
    for indices, _ in passes(runtime, rows, range(rows.rows), micro_size=micro_size):
        batch = rows.batch(indices).to(runtime.device)
        with torch.no_grad():
            scored_D = document_scores(runtime, model, batch).tolist()
        for document, score in zip(batch.document_ids, scored_D, strict=True):
            scores_D[document] = score
    model.train(was_training)
    return np.array(runtime.sum_over_ranks(scores_D))


def make_report(session: Session, stage: RewardStage, scores_D: np.ndarray) -> RewardReport:
    """The report; its baselines are fitted on training pairs."""
    held = session.held or session.rows
    tokenizer = load_tokenizer(session.context.base_folder)
    return report_of(
        scores_D[0::2],
        scores_D[1::2],
        held_out=_pairs(held, range(len(scores_D) // 2), tokenizer),
        training=_pairs(session.rows, _some(session.rows, stage.report_pairs), tokenizer),
    )


def report_fields(report: RewardReport) -> Mapping[str, Any]:
    """The report's entries in result.json."""
    return {"reward_report": report.as_json()}


def _some(rows: PreparedRows, most: int) -> Sequence[int]:
    return range(min(most, (len(rows.document_offsets) - 1) // 2))


def _pairs(rows: PreparedRows, numbers: Sequence[int], tokenizer: Any) -> Pairs:
    answers = [_answer(rows, document) for number in numbers for document in (2 * number, 2 * number + 1)]
    texts = tokenizer.decode_batch([ids.tolist() for ids in answers], skip_special_tokens=True)
    lengths = np.array([len(ids) for ids in answers])
    return Pairs(
        chosen=texts[0::2], rejected=texts[1::2], tokens_chosen_N=lengths[0::2], tokens_rejected_N=lengths[1::2]
    )


def _answer(rows: PreparedRows, document: int) -> np.ndarray:
    ids, trained = rows.document(document)
    return ids[trained]
