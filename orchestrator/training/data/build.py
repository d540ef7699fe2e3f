"""Builds the arrays of one set of prepared rows: read, parse, split, encode, pack, write."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from orchestrator.config.data import DataConfig
from orchestrator.dataset.formats import Example, RowProblem, parse_row
from orchestrator.dataset.packing import efficiency
from orchestrator.dataset.prepared import META, Kind, Meta, Statistics
from orchestrator.dataset.reading import Unreadable
from orchestrator.dataset.sources import SHOWN_PROBLEMS, settle_format, source_rows
from orchestrator.errors import DataError
from orchestrator.training.data.encode import Encoded, Encoder, encode_examples, make_encoder
from orchestrator.training.data.spans import NotRendered
from orchestrator.training.data.store import GrowingArray, make_rows, save_array, sync_folder, write_rows, write_synced
from orchestrator.training.data.tokenizer import load_facts

if TYPE_CHECKING:
    from orchestrator.training.data.prepare import Part

Say = Callable[[str], None]
CHUNK_ROWS = 512


@dataclass(frozen=True, slots=True)
class Placed:
    """An example with its place: source row number over all sources, and the words an error names it by."""

    row: int
    where: str
    example: Example
    hash: int


def build_rows(folder: Path, part: Part, config: DataConfig, *, tokenizer_folder: Path, seed: int, say: Say) -> None:
    """Writes every array of a part and its meta.json into `folder`. Raises DataError with all faulty rows."""
    encoder = make_encoder(load_facts(tokenizer_folder), config)
    examples, problems = _read(part)
    if problems:
        raise DataError(bounded(problems))
    if not examples:
        raise DataError(f"{part.sources[0][0].path} holds no rows")
    examples = _take_side(examples, part, config, seed)
    writer = _Writer(folder, encoder)
    for start in range(0, len(examples), CHUNK_ROWS):
        chunk = examples[start : start + CHUNK_ROWS]
        for placed, encoded in zip(chunk, encode_examples([item.example for item in chunk], encoder), strict=True):
            writer.add(placed, encoded)
    writer.finish(part, config, num_source_rows=len(examples))


def bounded(problems: Sequence[str]) -> list[str]:
    """The first problems and how many more there are."""
    shown = list(problems[:SHOWN_PROBLEMS])
    return shown if len(problems) <= SHOWN_PROBLEMS else [*shown, f"... and {len(problems) - SHOWN_PROBLEMS} more"]


def _read(part: Part) -> tuple[list[Placed], list[str]]:
    examples: list[Placed] = []
    problems: list[str] = []
    row_number = 0
    for source, files in part.sources:
        data_format = settle_format(source, files, field=f"data.{part.role}")
        for file, number, row in source_rows(files):
            where = f"{file}:{number}"
            if isinstance(row, Unreadable):
                problems.append(f"{where} {row.found}, {row.expected} expected")
            else:
                try:
                    example = parse_row(row, data_format, source.columns)
                    examples.append(Placed(row_number, where, example, example_hash(example)))
                except RowProblem as problem:
                    if problem.code == "equal_pair":
                        continue
                    problems.append(f"{where} {problem}")
            row_number += 1
    return examples, problems


def example_hash(example: Example) -> int:
    """64 bits that are the same for rows with the same words."""
    return int.from_bytes(hashlib.blake2b(repr(example).encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _take_side(examples: list[Placed], part: Part, config: DataConfig, seed: int) -> list[Placed]:
    """The rows of this side of a train/eval split: the rows with the smallest keyed hash are held out, equal rows together."""
    if part.key.components["split"] is None:
        return examples
    wanted = min(config.eval.max_rows, math.ceil(config.eval.fraction * len(examples)))
    keyed = [hashlib.blake2b(item.hash.to_bytes(8, "little"), key=seed.to_bytes(16, "little"), digest_size=8).digest() for item in examples]
    held_out = set(sorted(set(keyed))[:wanted])
    is_evaluation = part.role == "evaluation"
    return [item for item, key in zip(examples, keyed, strict=True) if (key in held_out) == is_evaluation]


class _Writer:
    """Collects the documents of a folder; owns its growing files."""

    def __init__(self, folder: Path, encoder: Encoder) -> None:
        self.folder, self.encoder = folder, encoder
        dtype = np.uint16 if encoder.facts.vocab_size <= 65_536 else np.uint32
        self.tokens = GrowingArray(folder / "tokens.npy", dtype)
        self.trained = GrowingArray(folder / "trained.npy", np.bool_)
        self.lengths: list[int] = []
        self.rows: list[int] = []
        self.values: list[float] = []
        self.hashes: list[int] = []
        self.problems: list[str] = []
        self.documents_per_row = 0
        self.truncated_rows = self.truncated_tokens = self.rows_losing = self.dropped = 0

    def add(self, placed: Placed, encoded: tuple[Encoded, ...] | NotRendered) -> None:
        if isinstance(encoded, NotRendered):
            self.problems.append(f"{placed.where} {encoded}")
            return
        num_cut = sum(document.num_cut for document in encoded)
        self.truncated_rows += num_cut > 0
        self.truncated_tokens += num_cut
        self.rows_losing += any(document.num_cut_trained for document in encoded)
        if not all(document.trained.any() for document in encoded):
            if any(document.num_cut_trained for document in encoded):
                self.dropped += 1
            else:
                self.problems.append(f"{placed.where} has no token to train")
            return
        self.documents_per_row = len(encoded)
        self.hashes.append(placed.hash)
        for document in encoded:
            self.tokens.append(document.ids)
            self.trained.append(document.trained)
            self.lengths.append(len(document.ids))
            self.rows.append(placed.row)
            self.values.append(math.nan if placed.example.value is None else placed.example.value)

    def finish(self, part: Part, config: DataConfig, *, num_source_rows: int) -> None:
        self.tokens.close()
        self.trained.close()
        if self.problems:
            raise DataError(bounded(self.problems))
        if not self.lengths:
            raise DataError(f"no row of {part.sources[0][0].path} has a token to train within max_length={config.max_length}")
        lengths = np.array(self.lengths, dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        trained = np.load(self.folder / "trained.npy", mmap_mode="r")
        segments = make_rows(lengths, packing=config.packing, max_length=config.max_length, documents_per_row=self.documents_per_row)
        write_rows(self.folder, segments, offsets, trained)
        save_array(self.folder, "document_offsets", offsets)
        save_array(self.folder, "document_rows", np.array(self.rows, dtype=np.int64))
        save_array(self.folder, "document_values", np.array(self.values, dtype=np.float32))
        save_array(self.folder, "row_hashes", np.array(self.hashes, dtype=np.uint64))
        num_rows = len(segments.offsets) - 1
        row_lengths = np.load(self.folder / "row_lengths.npy")
        capacity = config.max_length * self.documents_per_row if config.packing != "none" else int(row_lengths.max())
        statistics = Statistics(
            source_rows=num_source_rows,
            duplicates=num_source_rows - len(set(self.hashes)) - self.dropped,
            documents=len(lengths),
            rows=num_rows,
            tokens=int(lengths.sum()),
            trained_tokens=int(np.load(self.folder / "row_trained.npy").sum()),
            truncated_rows=self.truncated_rows,
            truncated_tokens=self.truncated_tokens,
            rows_losing_trained_tokens=self.rows_losing,
            dropped_rows=self.dropped,
            longest_tokens=int(row_lengths.max()),
            packing_efficiency=efficiency(lengths, num_rows, capacity),
        )
        kind: Kind = "pair" if self.documents_per_row == 2 else "single"
        meta = Meta(
            digest=part.key.digest,
            key=dict(part.key.components),
            kind=kind,
            max_length=config.max_length,
            packing=config.packing,
            pad_id=self.encoder.facts.pad_id,
            vocab_size=self.encoder.facts.vocab_size,
            statistics=statistics,
        )
        write_synced(self.folder / META, [meta.to_json().encode()])
        sync_folder(self.folder)
