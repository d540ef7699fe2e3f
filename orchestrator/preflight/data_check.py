"""Checks prepared rows before GPU time is spent: decodes trainable rows and compares them with the files; no model.

What `prepare` finds in every row (roles, types, templates, lengths) is not checked twice; instead the batches that the
loop would receive are decoded, with labels, and compared with the text of the source rows by an independent method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orchestrator.config.data import DataConfig
from orchestrator.data.encoding.tokenizer import TokenizerFacts, core_tokenizer, load_facts
from orchestrator.data.epoch import Epoch
from orchestrator.data.formats.examples import Chat, Example, Labelled, Plain, Prompt
from orchestrator.data.formats.parse import parse_row
from orchestrator.data.order import permutation
from orchestrator.data.preparation.prepare import Prepared, ensure_prepared
from orchestrator.data.prepared.meta import Statistics
from orchestrator.data.prepared.parts import PreparedSplit, plan_parts
from orchestrator.data.row_faults import Fault, FaultList
from orchestrator.data.sources.validate import reading_of, source_rows
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.losses.token_logprobs import IGNORED

RANDOM_ROWS, LONGEST_ROWS, SHOWN_ROWS = 200, 20, 3
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a row's text, and whether the loss counts it."""

    text: str
    trained: bool


@dataclass(frozen=True, slots=True)
class ShownRow:
    """One document as the loss sees it."""

    where: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class DataReport:
    """Results of `check` for the data of one stage."""

    statistics: Statistics
    evaluation_statistics: Statistics | None
    epoch: Epoch | None
    """None for sets that are scored but not trained on."""
    histogram: tuple[tuple[int, int, int], ...]
    """(from, to inclusive, documents) by length in tokens."""
    checked_rows: int
    shown: tuple[ShownRow, ...]
    faults: tuple[Fault, ...]
    fault_counts: tuple[tuple[str, int], ...]


def check_data(
    config: DataConfig,
    *,
    tokenizer_folder: Path,
    cache: Path,
    seed: int,
    epoch: Callable[[PreparedRows], Epoch] | None,
    say: Say,
    advance: Callable[[int], None] = lambda _rows: None,
) -> tuple[DataReport, Prepared]:
    """Prepare if needed, then check 200 random and the 20 longest rows. Raises DataError for what `prepare` finds."""
    prepared = ensure_prepared(
        config, tokenizer_folder=tokenizer_folder, cache=cache, seed=seed, say=say, advance=advance
    )
    (part, *_) = plan_parts(config, tokenizer_folder=tokenizer_folder, cache=cache / "data", seed=seed)
    rows = PreparedRows.open(prepared.train)
    facts = load_facts(tokenizer_folder)
    faults = FaultList()
    sample = sampled_rows(rows, seed)
    examples = _source_examples(rows, part, sample)
    shown: list[ShownRow] = []
    for index in sample:
        for document, pieces, tokens in _documents(rows, index, facts):
            unit = rows.unit_of(document)
            where = rows.where(int(rows.unit_rows[unit]), int(rows.unit_numbers[unit]), part.all_files)
            if len(shown) < SHOWN_ROWS:
                shown.append(ShownRow(where, pieces))
            if unit in examples and config.packing != "split":
                side = document % rows.meta.documents_per_unit
                for code, what in document_faults(examples[unit].documents[side], pieces, tokens, facts, config):
                    faults.add(Fault(code, where, what))
    report = DataReport(
        statistics=prepared.train_statistics,
        evaluation_statistics=prepared.evaluation_statistics,
        epoch=None if epoch is None else epoch(rows),
        histogram=histogram(np.diff(rows.document_offsets)[np.unique(rows.segment_documents)]),
        checked_rows=len(sample),
        shown=tuple(shown),
        faults=tuple(faults.kept),
        fault_counts=tuple(sorted(faults.counts.items())),
    )
    return report, prepared


def sampled_rows(rows: PreparedRows, seed: int) -> list[int]:
    """200 random trainable rows and the 20 longest, without duplicates."""
    random = permutation(rows.rows, seed, "check")[:RANDOM_ROWS].tolist()
    longest = np.argsort(-rows.lengths, kind="stable")[:LONGEST_ROWS].tolist()
    return list(dict.fromkeys([*random, *longest]))


def _source_examples(rows: PreparedRows, part: PreparedSplit, sample: Sequence[int]) -> dict[int, Example]:
    """The example of every unit in the sampled rows, reread from its file."""
    wanted: dict[int, int] = {}
    for index in sample:
        segments = slice(int(rows.row_offsets[index]), int(rows.row_offsets[index + 1]))
        for document in rows.segment_documents[segments].tolist():
            unit = rows.unit_of(document)
            wanted[int(rows.unit_rows[unit])] = unit
    examples: dict[int, Example] = {}
    row_id = 0
    for i, files in enumerate(part.files):
        for _, _, row in source_rows(files):
            if row_id in wanted:
                reading = reading_of(part.sources[i], part.formats[i])
                examples[wanted[row_id]] = parse_row(row, reading.format, reading.columns, labels=reading)
            row_id += 1
    return examples


def _documents(
    rows: PreparedRows, index: int, facts: TokenizerFacts
) -> Iterator[tuple[int, tuple[Piece, ...], list[int]]]:
    """(document, its pieces, its tokens) of a trainable row, from the very batch that the loop would receive."""
    batch = rows.batch([index])
    segments = slice(int(rows.row_offsets[index]), int(rows.row_offsets[index + 1]))
    for document, span in zip(rows.segment_documents[segments].tolist(), batch.documents, strict=True):
        tokens = batch.input_ids_BT[span.sequence, span.start : span.stop].tolist()
        labels = batch.labels_BT[span.sequence, span.start : span.stop].tolist()
        assert all(label in (IGNORED, token) for label, token in zip(labels, tokens, strict=True))
        yield document, decoded_pieces(tokens, [label != IGNORED for label in labels], facts), tokens


def decoded_pieces(tokens: Sequence[int], trained: Sequence[bool], facts: TokenizerFacts) -> tuple[Piece, ...]:
    """The text of every stretch of tokens that are all trained, or all untrained."""
    tokenizer = core_tokenizer(facts.core)
    runs: list[tuple[bool, list[int]]] = []
    for token, learnt in zip(tokens, trained, strict=True):
        if not runs or runs[-1][0] != learnt:
            runs.append((learnt, []))
        runs[-1][1].append(token)
    return tuple(Piece(tokenizer.decode(run, skip_special_tokens=False), learnt) for learnt, run in runs)


def document_faults(
    document: object, pieces: Sequence[Piece], tokens: Sequence[int], facts: TokenizerFacts, config: DataConfig
) -> Iterator[tuple[str, str]]:
    """(code, description) of every fault of a document: trained text versus the row's answers, token structure."""
    learnt = [piece.text for piece in pieces if piece.trained]
    is_cut = len(tokens) >= config.max_length
    if facts.bos_id is not None and list(tokens[:2]) == [facts.bos_id] * 2:
        yield "double_bos", "starts with two beginning-of-text tokens"
    if isinstance(document, Prompt | Labelled):
        return  # no token is trained: answers are sampled, or a class is predicted
    if not learnt:
        yield "zero_trained_tokens", "has no token to train"
        return
    if config.loss_on == "all" or not isinstance(document, (Chat, Plain)):
        return
    if not is_cut:
        yield from _answer_faults(document, learnt, config)
        if not _is_special(tokens, pieces, facts):
            yield "untrained_turn_end", "ends its last answer without a special token"
    yield from _prompt_faults(document, learnt)


def _answers(document: Chat | Plain) -> list[str]:
    if isinstance(document, Plain):
        return [document.completion]
    pairs = zip(document.messages, document.trained, strict=True)
    return [message["content"] for message, trained in pairs if trained and message["content"].strip()]


def _answer_faults(document: Chat | Plain, learnt: Sequence[str], config: DataConfig) -> Iterator[tuple[str, str]]:
    """Every answer's last words must be trained."""
    text = "\n".join(learnt)
    answers = _answers(document)[-1:] if config.loss_on == "last_answer" else _answers(document)
    for answer in answers:
        words = _squeezed(answer)[-32:]
        if words not in _squeezed(text):
            yield "changed_answer", f"does not train the answer that ends with {answer.strip()[-32:]!r}"


def _prompt_faults(document: Chat | Plain, learnt: Sequence[str]) -> Iterator[tuple[str, str]]:
    """No prompt's last words may be trained, unless an answer contains them too."""
    if isinstance(document, Plain):
        prompts = [document.prompt] if document.prompt.strip() else []
        own = document.completion
    else:
        prompts = [m["content"] for m in document.messages if m["role"] in ("user", "system") and m["content"].strip()]
        own = "\n".join(str(m) for m in document.messages if m["role"] == "assistant")
    text, said = _squeezed("\n".join(learnt)), _squeezed(own)
    for prompt in prompts:
        words = _squeezed(prompt)[-32:]
        if len(words) >= 12 and words in text and words not in said:
            yield "trained_prompt", f"trains the prompt that ends with {prompt.strip()[-32:]!r}"


def _squeezed(text: str) -> str:
    """Without whitespace, which tokenizers and templates may move."""
    return "".join(text.split())


def _is_special(tokens: Sequence[int], pieces: Sequence[Piece], facts: TokenizerFacts) -> bool:
    """Whether the last trained stretch ends with a special token."""
    last = next(piece.text for piece in reversed(pieces) if piece.trained).rstrip()
    special = core_tokenizer(facts.core).get_added_tokens_decoder().values()
    return any(last.endswith(token.content) for token in special) and bool(tokens)


def histogram(lengths: Sequence[int] | np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """(from, to inclusive, count) over powers of two."""
    values = np.asarray(lengths)
    if not len(values):
        return ()
    top = max(1, math.ceil(math.log2(max(2, int(values.max())))))
    edges = [0, *(2**power for power in range(max(1, top - 7), top + 1))]
    counts, _ = np.histogram(values, bins=[edge + 0.5 for edge in edges])
    return tuple((low + 1, high, int(count)) for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True))
