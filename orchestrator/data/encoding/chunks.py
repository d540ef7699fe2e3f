"""Pieces of a data set, encoded in this process or another: rows in, arrays out; no torch, no transformers."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from orchestrator.data.encoding.answer_spans import NotRendered
from orchestrator.data.encoding.encoder import Encoded, Encoder, encode_examples
from orchestrator.data.formats.examples import Example, Labelled, Prompt, Reading
from orchestrator.data.row_faults import Fault, FaultList
from orchestrator.data.sources.locate import known_kind
from orchestrator.data.sources.readers import parse_line, position, read_rows
from orchestrator.data.sources.validate import parse_or_fault

CHUNK_BYTES = 1 << 18
CHUNK_ROWS = 512


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows of one file: a byte range of a JSONL file, or the rows themselves."""

    source: int
    path: str
    first_number: int
    """Line of the first row of a byte range; rows passed directly carry their numbers."""
    start: int
    stop: int
    rows: tuple[tuple[int, object], ...] | None


@dataclass(frozen=True, slots=True)
class ChunkContext:
    """What all chunks of a data set share; sent to a worker process once."""

    encoder: Encoder
    readings: tuple[Reading, ...]
    """How the rows of each source are interpreted."""


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """The encoded rows of a chunk. A unit is a kept row; it has one document, or two (chosen, rejected)."""

    num_rows: int
    """Rows of the chunk, kept or not."""
    unit_rows: npt.NDArray[np.int64]
    """Each unit's row, counted from the chunk's first."""
    unit_numbers: npt.NDArray[np.int64]
    """Each unit's line or row number in its file."""
    unit_hashes: npt.NDArray[np.uint64]
    unit_values: npt.NDArray[np.float32]
    unit_cut: npt.NDArray[np.int32]
    """Tokens of each unit beyond the maximum length."""
    unit_cut_trained: npt.NDArray[np.int32]
    """Trained tokens among them."""
    unit_extras: tuple[str, ...]
    """JSON of the extra data of each unit; empty if there is none."""
    documents_per_unit: int
    lengths: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.uint32]
    trained: npt.NDArray[np.bool_]
    counts: Mapping[str, int]
    """Dropped rows by reason."""
    faults: tuple[Fault, ...]
    fault_counts: Mapping[str, int]

    def without_tokens(self) -> ChunkResult:
        """A copy without tokens, to keep while the tokens go to disk."""
        return replace(self, tokens=self.tokens[:0], trained=self.trained[:0])


def iterate_chunks(source: int, path: Path) -> Iterator[Chunk]:
    """The chunks of a file, in order. A JSONL file is only split here; encoding a chunk reads and parses it."""
    kind = known_kind(path)
    if kind == "jsonl" and path.suffix != ".gz":
        yield from _line_ranges(source, path)
        return
    rows: list[tuple[int, object]] = []
    for number, row in read_rows(path, kind):
        rows.append((number, row))
        if len(rows) == CHUNK_ROWS:
            yield Chunk(source, str(path), rows[0][0], 0, 0, tuple(rows))
            rows = []
    if rows:
        yield Chunk(source, str(path), rows[0][0], 0, 0, tuple(rows))


def _line_ranges(source: int, path: Path) -> Iterator[Chunk]:
    line, start = 1, 0
    with path.open("rb") as file:
        while block := file.read(CHUNK_BYTES):
            block += file.readline()
            yield Chunk(source, str(path), line, start, start + len(block), None)
            line += block.count(b"\n")
            start += len(block)


def chunk_rows(chunk: Chunk) -> Iterator[tuple[int, object]]:
    """(line or row number, row or Unreadable) of a chunk."""
    if chunk.rows is not None:
        yield from chunk.rows
        return
    with Path(chunk.path).open("rb") as file:
        file.seek(chunk.start)
        block = file.read(chunk.stop - chunk.start)
    if chunk.start == 0:
        block = block.removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(block.split(b"\n"), start=chunk.first_number):
        stripped = line.strip()
        if stripped:
            yield number, parse_line(stripped)


def encode_chunk(chunk: Chunk, context: ChunkContext) -> ChunkResult:
    """Parse, render and encode the rows of a chunk; faulty rows are reported in the result."""
    units = _Units()
    placed: list[tuple[int, int, Example]] = []
    row = -1
    for row, (number, value) in enumerate(chunk_rows(chunk)):
        parsed = parse_or_fault(value, position(chunk.path, number), context.readings[chunk.source])
        if isinstance(parsed, Fault):
            units.faults.add(parsed)
        elif isinstance(parsed, str):
            units.counts[parsed] += 1
        else:
            placed.append((row, number, parsed))
    encoded = encode_examples([example for _, _, example in placed], context.encoder)
    for (index, number, example), documents in zip(placed, encoded, strict=True):
        units.add(index, position(chunk.path, number), number, example, documents, context.encoder)
    return units.result(row + 1)


def example_hash(example: Example) -> int:
    """64 bits that are equal for rows with the same text."""
    return int.from_bytes(
        hashlib.blake2b(repr(example).encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )


@dataclass(slots=True)
class _Units:
    """Collects the kept rows of a chunk."""

    rows: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    extras: list[str] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    cuts_trained: list[int] = field(default_factory=list)
    ids: list[npt.NDArray[np.uint32]] = field(default_factory=list)
    trained: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    documents_per_unit: int = 1
    counts: Counter[str] = field(default_factory=Counter)
    faults: FaultList = field(default_factory=FaultList)

    def add(
        self,
        row: int,
        where: str,
        number: int,
        example: Example,
        documents: tuple[Encoded, ...] | NotRendered,
        encoder: Encoder,
    ) -> None:
        if isinstance(documents, NotRendered):
            self.faults.add(Fault(documents.code, where, str(documents)))
            return
        is_prompt = isinstance(example.documents[0], Prompt)
        is_untrained = is_prompt or isinstance(example.documents[0], Labelled)
        fault = next(
            (found for document in documents if (found := document_fault(document, where, encoder, is_untrained))), None
        )
        if fault is not None:
            self.faults.add(fault)
            return
        if is_prompt and documents[0].num_cut:
            self.counts["dropped_long_prompts"] += 1
        elif not is_untrained and not all(document.trained.any() for document in documents):
            self.counts["dropped_behind_max_length"] += 1
        else:
            self._keep(row, number, example, documents)

    def _keep(self, row: int, number: int, example: Example, documents: Sequence[Encoded]) -> None:
        self.rows.append(row)
        self.numbers.append(number)
        self.hashes.append(example_hash(example))
        self.values.append(math.nan if example.value is None else example.value)
        if example.extra is not None:
            self.extras.append(example.extra)
        self.cuts.append(sum(document.num_cut for document in documents))
        self.cuts_trained.append(sum(document.num_cut_trained for document in documents))
        self.documents_per_unit = len(documents)
        self.ids += [document.ids for document in documents]
        self.trained += [document.trained for document in documents]

    def result(self, num_rows: int) -> ChunkResult:
        return ChunkResult(
            num_rows=num_rows,
            unit_rows=np.array(self.rows, dtype=np.int64),
            unit_numbers=np.array(self.numbers, dtype=np.int64),
            unit_hashes=np.array(self.hashes, dtype=np.uint64),
            unit_values=np.array(self.values, dtype=np.float32),
            unit_cut=np.array(self.cuts, dtype=np.int32),
            unit_cut_trained=np.array(self.cuts_trained, dtype=np.int32),
            unit_extras=tuple(self.extras),
            documents_per_unit=self.documents_per_unit,
            lengths=np.array([len(ids) for ids in self.ids], dtype=np.int64),
            tokens=np.concatenate(self.ids) if self.ids else np.zeros(0, dtype=np.uint32),
            trained=np.concatenate(self.trained) if self.trained else np.zeros(0, dtype=np.bool_),
            counts=dict(self.counts),
            faults=tuple(self.faults.kept),
            fault_counts=dict(self.faults.counts),
        )


def document_fault(document: Encoded, where: str, encoder: Encoder, is_untrained: bool) -> Fault | None:
    """What is wrong with an encoded document, or None. Losing trained tokens to truncation alone is no fault.

    `is_untrained`: no token is trained, since answers are sampled or a class is predicted.
    """
    bos = encoder.facts.bos_id
    if bos is not None and len(document.ids) > 1 and document.ids[0] == bos and document.ids[1] == bos:
        return Fault("double_bos", where, "starts with two beginning-of-text tokens")
    if is_untrained:
        return None
    if not document.trained.any() and not document.num_cut_trained:
        return Fault("zero_trained_tokens", where, "has no token to train")
    if document.num_open_ends and not document.num_cut_trained:
        return Fault("untrained_turn_end", where, "has an answer whose end is not trained")
    if document.num_straddling:
        return Fault("trained_prompt", where, f"has {document.num_straddling} tokens that are part prompt, part answer")
    return None
