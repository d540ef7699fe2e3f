"""Builds the arrays of one set of prepared rows: read, encode, select, pack, write; no torch."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from orchestrator.config.data import DataConfig, held_out_rows
from orchestrator.data.encoding.chunks import Chunk, ChunkContext, ChunkResult, encode_chunk, iterate_chunks
from orchestrator.data.encoding.encoder import Encoder, make_encoder
from orchestrator.data.encoding.tokenizer import load_facts
from orchestrator.data.encoding.worker_pool import encode_in_processes, usable_cores
from orchestrator.data.formats.columns import KINDS
from orchestrator.data.preparation.selection import first_occurrences, held_out, mixture
from orchestrator.data.preparation.store import GrowingArray, Store, Units, write_store
from orchestrator.data.prepared.meta import EVALUATION, Kind
from orchestrator.data.prepared.parts import PreparedSplit
from orchestrator.data.row_faults import FaultList
from orchestrator.data.sources.locate import known_kind
from orchestrator.data.sources.readers import count_rows
from orchestrator.data.sources.validate import reading_of
from orchestrator.errors import DataError

Say = Callable[[str], None]
TRIAL_SECONDS = 0.5
"""Rows are encoded in this process for this long; the rest decides whether to start processes or to refuse."""
PARALLEL_SECONDS = 3.0
"""Processes are started for more work than this; starting them takes about a second."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long building may take, what to type if it takes longer, and who is notified of progress."""

    seconds: float | None
    prepare_command: str
    advance: Callable[[int], None]
    """Called with the number of rows read so far."""


def build_rows(
    folder: Path,
    part: PreparedSplit,
    config: DataConfig,
    *,
    tokenizer_folder: Path,
    seed: int,
    say: Say,
    limits: Limits,
) -> None:
    """Write every array of a part and its meta.json into `folder`. Raises DataError with the faulty rows."""
    encoder = make_encoder(load_facts(tokenizer_folder), config)
    context = _context(part, encoder)
    collected = _Collected(folder, encoder)
    for chunk, result in _encode_all(part, context, config, say, limits):
        collected.add(chunk, result)
        limits.advance(collected.num_rows)
    collected.faults.raise_if_any()
    units = collected.units(part)
    if not len(units.rows):
        raise DataError(
            f"{part.sources[0].path}: no row has anything to train within max_length={config.max_length} ({collected.num_rows} rows read)"
        )
    store = _store(folder, part, encoder, config, collected)
    chosen, evaluated = _select(units, part, config, seed, collected.num_rows)
    if evaluated is not None:
        (folder / EVALUATION).mkdir()
        write_store(
            store.inside(EVALUATION),
            units.subset(evaluated, folder / EVALUATION),
            None,
            source_rows=len(evaluated),
            dropped={},
        )
    write_store(store, units, chosen, source_rows=collected.num_rows, dropped=dict(collected.counts))


def _store(folder: Path, part: PreparedSplit, encoder: Encoder, config: DataConfig, collected: _Collected) -> Store:
    return Store(
        folder=folder,
        digest=part.digest,
        key=part.key,
        kind=cast("Kind", KINDS[part.formats[0]]),
        format=part.formats[0],
        encoder=encoder,
        config=config,
        file_rows=tuple(collected.file_rows[str(path)] for files in part.files for path in files),
    )


def _encode_all(
    part: PreparedSplit, context: ChunkContext, config: DataConfig, say: Say, limits: Limits
) -> Iterator[tuple[Chunk, ChunkResult]]:
    """Every chunk with its result: the first ones encoded here, the rest in processes if that pays."""
    chunks = chain.from_iterable(iterate_chunks(i, path) for i, files in enumerate(part.files) for path in files)
    started, done_rows = time.perf_counter(), 0
    for chunk in chunks:
        result = encode_chunk(chunk, context)
        done_rows += result.num_rows
        yield chunk, result
        if time.perf_counter() - started >= TRIAL_SECONDS:
            break
    else:
        return
    rate = done_rows / (time.perf_counter() - started)
    cores = _cores(config)
    rest = count_part_rows(part) - done_rows
    seconds = rest / rate
    _refuse_if_long(rest, seconds / cores, limits)
    if cores == 1 or seconds < PARALLEL_SECONDS:
        yield from ((chunk, encode_chunk(chunk, context)) for chunk in chunks)
        return
    say(
        f"preparing {rest + done_rows:,} rows of {part.role} in {cores} processes: about {math.ceil(seconds / cores)} s"
    )
    sent: list[Chunk] = []

    def remembered() -> Iterator[Chunk]:
        for chunk in chunks:
            sent.append(Chunk(chunk.source, chunk.path, chunk.first_number, chunk.start, chunk.stop, None))
            yield chunk

    for position, result in enumerate(encode_in_processes(remembered(), context, num_processes=cores)):
        yield sent[position], result


def count_part_rows(part: PreparedSplit) -> int:
    """Rows in all files of a part."""
    return sum(count_rows(path, known_kind(path)) for files in part.files for path in files)


def _refuse_if_long(rows: int, seconds: float, limits: Limits) -> None:
    if limits.seconds is not None and seconds > limits.seconds:
        raise DataError(
            f"preparing {rows:,} rows would take about {math.ceil(seconds)} s here, more than {limits.seconds:.0f} s, while the "
            f"other ranks wait: prepare them first with\n{limits.prepare_command}"
        )


def _select(
    units: Units, part: PreparedSplit, config: DataConfig, seed: int, num_rows: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64] | None]:
    """The units to train on (repeated if a mixture says so) and those split off for evaluation."""
    usable = first_occurrences(units.hashes) if config.deduplicate else np.ones(len(units.rows), dtype=np.bool_)
    evaluated: npt.NDArray[np.int64] | None = None
    if part.splits:
        wanted = held_out_rows(num_rows, config.eval)
        is_held = held_out(units.hashes[usable], wanted, seed)
        usable_units = np.flatnonzero(usable)
        evaluated = usable_units[is_held]
        usable[evaluated] = False
        if not usable.any() or not len(evaluated):
            raise DataError(
                f"{part.sources[0].path} has too few rows ({num_rows}) to hold some out: give eval.path=FILE or eval.path=none"
            )
    per_source = [np.flatnonzero(usable & (units.sources == i)) for i in range(len(part.sources))]
    return np.concatenate(mixture(per_source, part.sources, seed)), evaluated


@dataclass
class _Collected:
    """The results of the chunks, in order; owns the growing token files."""

    folder: Path
    encoder: Encoder
    num_rows: int = 0
    documents_per_unit: int = 1
    results: list[tuple[int, int, ChunkResult]] = field(default_factory=list)
    """Source, first row id, and the result without its tokens."""
    extras: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    file_rows: Counter[str] = field(default_factory=Counter)
    faults: FaultList = field(default_factory=FaultList)

    def __post_init__(self) -> None:
        dtype = np.uint16 if self.encoder.facts.vocab_size <= 65_536 else np.uint32
        self._tokens = GrowingArray(self.folder / "tokens.npy", dtype)
        self._trained = GrowingArray(self.folder / "trained.npy", np.bool_)

    def add(self, chunk: Chunk, result: ChunkResult) -> None:
        self._tokens.append(result.tokens)
        self._trained.append(result.trained)
        self.results.append((chunk.source, self.num_rows, result.without_tokens()))
        self.num_rows += result.num_rows
        self.file_rows[chunk.path] += result.num_rows
        self.extras += result.unit_extras
        self.counts.update(result.counts)
        self.faults.extend(result.faults, result.fault_counts)
        if len(result.unit_rows):
            self.documents_per_unit = result.documents_per_unit

    def units(self, part: PreparedSplit) -> Units:
        """All kept rows as whole arrays; completes the token files."""
        self._tokens.close()
        self._trained.close()

        def joined(name: str, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
            return np.concatenate(
                [np.zeros(0, dtype=dtype), *(getattr(result, name) for _, _, result in self.results)]
            ).astype(dtype)

        lengths = joined("lengths", np.int64)
        rows: Sequence[npt.NDArray[np.int64]] = [result.unit_rows + first for _, first, result in self.results]
        return Units(
            folder=self.folder,
            rows=np.concatenate([np.zeros(0, dtype=np.int64), *rows]),
            sources=np.concatenate(
                [np.zeros(0, dtype=np.int64), *(np.full(len(r.unit_rows), s) for s, _, r in self.results)]
            ),
            numbers=joined("unit_numbers", np.int64),
            hashes=joined("unit_hashes", np.uint64),
            values=joined("unit_values", np.float32),
            cut=joined("unit_cut", np.int32),
            cut_trained=joined("unit_cut_trained", np.int32),
            extras=tuple(self.extras),
            documents_per_unit=self.documents_per_unit,
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        )


def _context(part: PreparedSplit, encoder: Encoder) -> ChunkContext:
    pairs = zip(part.sources, part.formats, strict=True)
    return ChunkContext(encoder, tuple(reading_of(source, data_format) for source, data_format in pairs))


def _cores(config: DataConfig) -> int:
    return config.num_processes if config.num_processes is not None else usable_cores()
