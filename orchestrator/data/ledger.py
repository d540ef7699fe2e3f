"""The record of the rows that every rank used at every step, and the proof that an epoch used each exactly once.

Must not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from orchestrator.data.order import FILLER
from orchestrator.data.prepared.folder import PreparedFolder

SHOWN_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class Taken:
    """The rows that one rank used at one step."""

    step: int
    attempt: int
    rank: int
    world_size: int
    rows: tuple[int, ...]
    """Trainable rows by index; -1 for fillers."""


class Ledger:
    """Appends to one rank's file; a line is one step. Owns the file."""

    def __init__(self, path: Path, *, attempt: int, rank: int, world_size: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_torn = _ends_within_a_line(path)
        self._file: IO[str] = path.open("a", encoding="utf-8")
        if is_torn:  # this rank was killed while writing: new lines must not be appended to the torn one
            self._file.write("\n")
        self._attempt, self._rank, self._world_size = attempt, rank, world_size

    def record(self, step: int, rows: Iterable[int]) -> None:
        """The rows of all micro-batches of step `step` (from 1), as they were given to the model."""
        taken = {"step": step, "attempt": self._attempt, "rank": self._rank, "world_size": self._world_size}
        self._file.write(json.dumps({**taken, "rows": [int(row) for row in rows]}, separators=(",", ":")) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _ends_within_a_line(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) != b"\n"


def ledger_path(folder: Path, rank: int) -> Path:
    """The file of a rank below a stage's folder of ledgers."""
    return folder / f"rank-{rank:05}.jsonl"


def read_ledgers(folder: Path) -> Iterator[Taken]:
    """Every whole line of every rank's file; a torn last line (the rank was killed while writing) is skipped."""
    for path in sorted(folder.glob("rank-*.jsonl")):
        for line in path.read_bytes().split(b"\n"):
            try:
                fields = cast("dict[str, Any]", json.loads(line))
                yield Taken(
                    fields["step"], fields["attempt"], fields["rank"], fields["world_size"], tuple(fields["rows"])
                )
            except (ValueError, KeyError, TypeError):
                continue


@dataclass(frozen=True, slots=True)
class Audit:
    """Result of the proof."""

    steps: int
    whole_epochs: int
    rows: int
    """Trainable rows of the data set."""
    attempts: tuple[int, ...]
    world_sizes: tuple[int, ...]
    replayed_steps: int
    """Steps that more than one attempt executed; the last one counts."""
    problems: tuple[str, ...]

    @property
    def is_exact(self) -> bool:
        """Whether every row was used exactly once in every complete epoch, and at most once in the last."""
        return not self.problems


def counted_steps(taken: Iterable[Taken]) -> dict[int, list[Taken]]:
    """Step -> the rows of its ranks, in the last attempt that reached it."""
    steps: dict[int, list[Taken]] = {}
    for entry in taken:
        known = steps.get(entry.step)
        if known is None or entry.attempt > known[0].attempt:
            steps[entry.step] = [entry]
        elif entry.attempt == known[0].attempt:
            known.append(entry)
    return steps


def audit(
    folder: Path, rows: PreparedFolder, *, steps_per_epoch: int, skipped_steps: frozenset[int] = frozenset()
) -> Audit:
    """Prove from the ranks' ledgers that every epoch uses every row once, across restarts and world sizes.

    `skipped_steps` (from 1) were omitted on purpose and are reported elsewhere.
    """
    entries = list(read_ledgers(folder))
    steps = counted_steps(entries)
    problems = list(_gaps(steps, skipped_steps))
    last = max(steps, default=0)
    epochs = range(-(-last // steps_per_epoch))
    for epoch in epochs:
        first, end = epoch * steps_per_epoch + 1, min((epoch + 1) * steps_per_epoch, last)
        is_whole = end == (epoch + 1) * steps_per_epoch
        skips = any(first <= step <= end for step in skipped_steps)
        taken = [entry for step in range(first, end + 1) for entry in steps.get(step, [])]
        problems += _epoch_problems(epoch, taken, rows, is_whole=is_whole and not skips)
    attempts = {(entry.step, entry.attempt) for entry in entries}
    return Audit(
        steps=len(steps),
        whole_epochs=last // steps_per_epoch,
        rows=rows.rows,
        attempts=tuple(sorted({entry.attempt for entry in entries})),
        world_sizes=tuple(sorted({entry.world_size for entry in entries})),
        replayed_steps=len(attempts) - len(steps),
        problems=tuple(
            problems[:SHOWN_PROBLEMS] + ([f"... {len(problems)} in all"] if len(problems) > SHOWN_PROBLEMS else [])
        ),
    )


def _gaps(steps: dict[int, list[Taken]], skipped: frozenset[int]) -> Iterator[str]:
    """Steps that are missing, and ranks that are missing in a step."""
    for step in range(1, max(steps, default=0) + 1):
        if step in skipped:
            continue
        if step not in steps:
            yield f"step {step} is in no ledger"
            continue
        entries = steps[step]
        ranks = sorted(entry.rank for entry in entries)
        if ranks != list(range(entries[0].world_size)):
            yield f"step {step}, attempt {entries[0].attempt}: ranks {ranks} of {entries[0].world_size} wrote"


def _epoch_problems(epoch: int, taken: Sequence[Taken], rows: PreparedFolder, *, is_whole: bool) -> Iterator[str]:
    indices = np.array([row for entry in taken for row in entry.rows if row != FILLER], dtype=np.int64)
    outside = indices[(indices < 0) | (indices >= rows.rows)]
    if len(outside):
        yield f"epoch {epoch + 1}: row {outside[0]} is not one of the {rows.rows}"
        return
    counts = np.bincount(indices, minlength=rows.rows)
    for index in np.flatnonzero(counts > 1).tolist():
        yield f"epoch {epoch + 1}: row {index} (source rows {_named(rows, index)}) was taken {counts[index]} times"
    if is_whole:
        for index in np.flatnonzero(counts == 0).tolist():
            yield f"epoch {epoch + 1}: row {index} (source rows {_named(rows, index)}) was never taken"


def _named(rows: PreparedFolder, index: int) -> str:
    return ", ".join(str(row) for row in rows.row_ids(index)[:5])
