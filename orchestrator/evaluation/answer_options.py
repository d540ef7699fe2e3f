"""Which of a few answers a causal model finds most likely: the options of a set of rows, and their log-likelihoods.

R rows, O options of up to N tokens, T tokens of a prompt, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.config.evaluation import Options
from orchestrator.data.encoding.tokenizer import TokenizerFacts, core_tokenizer
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.distributed.runtime import Runtime
from orchestrator.errors import DataError

MOST_OPTIONS = 16
ROWS_FOR_AN_OPTION = 2
"""`options: auto` uses a set's own answers if there are at most this many, with this many rows each on average."""

Ids = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class AnsweredRow:
    """A row as a question and its answer; the answer ends with the trained end of the turn."""

    prompt: Ids
    answer: Ids


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """Rows that share the same answer options."""

    rows: tuple[AnsweredRow, ...]
    names: tuple[str, ...]
    """The options' texts."""
    options: tuple[Ids, ...]
    """Their tokens, including the end of the turn."""
    right: tuple[int, ...]
    """The index of each row's correct option."""


def answered_rows(rows: PreparedRows, count: int) -> list[AnsweredRow] | None:
    """The first `count` rows as questions with one answer each; None if a row has several answers or no question."""
    if rows.meta.kind != "text":
        return None
    found: list[AnsweredRow] = []
    for index in range(min(count, rows.rows)):
        ids, trained = rows.document(rows.document_of(index))
        positions = trained.nonzero()[0]
        first, last = int(positions[0]), int(positions[-1])
        if first == 0 or len(positions) != last - first + 1:
            return None
        found.append(AnsweredRow(prompt=tuple(ids[:first].tolist()), answer=tuple(ids[first : last + 1].tolist())))
    if all(len(row.prompt) <= 1 for row in found):  # plain text: its first token is not a question
        return None
    return found


def choices_of(
    rows: Sequence[AnsweredRow] | None, wanted: Options, facts: TokenizerFacts, *, field: str
) -> AnswerOptions | None:
    """The options of a set; None if there are none, or too many for `auto`. DataError if a list does not fit."""
    if wanted == "none" or (rows is None and wanted == "auto"):
        return None
    if rows is None:
        raise DataError(
            f"{field}.options: {list(wanted)} are given, but the rows are no questions with one answer each; set options=none"
        )
    seen: dict[Ids, str] = {row.answer: text_of(row.answer, facts) for row in rows}
    if wanted != "auto":
        seen = _listed(rows, seen, wanted, facts, field=field)
    elif not 1 < len(seen) <= min(MOST_OPTIONS, len(rows) // ROWS_FOR_AN_OPTION):
        return None
    options = tuple(sorted(seen, key=lambda ids: (seen[ids], ids)))
    return AnswerOptions(
        rows=tuple(rows),
        names=tuple(seen[ids] for ids in options),
        options=options,
        right=tuple(options.index(row.answer) for row in rows),
    )


def text_of(ids: Sequence[int], facts: TokenizerFacts) -> str:
    """An answer without special tokens and surrounding whitespace."""
    return core_tokenizer(facts.core).decode(list(ids), skip_special_tokens=True).strip()


def _listed(
    rows: Sequence[AnsweredRow], seen: dict[Ids, str], wanted: Sequence[str], facts: TokenizerFacts, *, field: str
) -> dict[Ids, str]:
    """The tokens of every listed option: taken from a row with that answer, or from a row with its answer replaced."""
    strangers = sorted(set(seen.values()) - set(wanted))
    if strangers:
        raise DataError(
            f"{field}.options: the rows are also answered by {', '.join(strangers[:5])}; {list(wanted)} is given"
        )
    found = {ids: text for ids, text in seen.items()}
    for text in wanted:
        if text not in seen.values():
            found[_in_place_of(rows[0].answer, text, facts, field=field)] = text
    return found


def _in_place_of(answer: Ids, text: str, facts: TokenizerFacts, *, field: str) -> Ids:
    tokenizer = core_tokenizer(facts.core)
    whole, own = tokenizer.decode(list(answer), skip_special_tokens=False), text_of(answer, facts)
    if tuple(tokenizer.encode(whole, add_special_tokens=False).ids) != answer:
        raise DataError(
            f"{field}.options: no row is answered by {text!r}, and this tokenizer does not show how it would be written; "
            "set options=auto, or add a row with this answer"
        )
    before, _, after = whole.partition(own)
    return tuple(tokenizer.encode(before + text + after, add_special_tokens=False).ids)


@torch.no_grad()
def option_logprobs_RO(runtime: Runtime, model: torch.nn.Module, choices: AnswerOptions) -> torch.Tensor:
    """log p(option | prompt) in nats, summed over the option's tokens and its end; fp64 on the CPU, the same on all ranks.

    Every rank must call it and scores a share of the rows. The prompt goes through the model once; the options continue on copies of its cache.
    """
    width = max(len(option) for option in choices.options)
    padded_ON = torch.zeros((len(choices.options), width), dtype=torch.int64)
    real_ON = torch.zeros_like(padded_ON, dtype=torch.bool)
    for o, option in enumerate(choices.options):
        padded_ON[o, : len(option)] = torch.tensor(option)
        real_ON[o, : len(option)] = True
    was_training = model.training
    model.eval()
    found_RO = torch.zeros((len(choices.rows), len(choices.options)), dtype=torch.float64)
    with runtime.forward_context():
        for turn in runtime.turns(len(choices.rows)):
            scores_O = _row_logprobs_O(model, choices.rows[turn or 0].prompt, padded_ON.to(runtime.device), real_ON)
            if turn is not None:
                found_RO[turn] = scores_O
    model.train(was_training)
    shared = runtime.sum_over_ranks(found_RO.flatten().tolist())
    return torch.tensor(shared, dtype=torch.float64).view_as(found_RO)


def _row_logprobs_O(model: Any, prompt: Ids, options_ON: torch.Tensor, real_ON: torch.Tensor) -> torch.Tensor:
    ids_1T = torch.tensor([prompt], device=options_ON.device)
    seen = model(input_ids=ids_1T, use_cache=True, logits_to_keep=1)
    logits_ONV = seen.logits[:, -1:].expand(len(options_ON), 1, -1)
    if options_ON.shape[1] > 1:
        cache = seen.past_key_values
        cache.batch_repeat_interleave(len(options_ON))
        rest = model(input_ids=options_ON[:, :-1], past_key_values=cache, use_cache=True)
        logits_ONV = torch.cat([logits_ONV, rest.logits], dim=1)
    logprobs_ON = logits_ONV.float().log_softmax(-1).gather(2, options_ON[:, :, None])[:, :, 0]
    return logprobs_ON.cpu().double().where(real_ON, 0.0).sum(1)
