"""Batches made ahead are those that are asked for: also after a jump, with rows that a step makes for itself, and after an error."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from data_parts import FAMILIES, data_config, write_jsonl, write_tokenizer

from orchestrator.data.preparation.prepare import ensure_prepared
from orchestrator.dataloader.batch import Batch
from orchestrator.dataloader.prefetch import Batches
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.errors import DataError

CPU = torch.device("cpu")


class Watched:
    """Prepared rows that write down what they made, and in which thread."""

    def __init__(self, rows: PreparedRows) -> None:
        self.rows = rows
        self.made: list[tuple[tuple[int, ...], bool]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rows, name)

    def batch(self, indices: Sequence[int]) -> Batch:
        if 99 in indices:
            raise DataError("row 99: not there")
        self.made.append((tuple(indices), threading.current_thread() is threading.main_thread()))
        return self.rows.batch(indices)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> PreparedRows:
    folder = tmp_path_factory.mktemp("batches")
    write_tokenizer(folder, FAMILIES["chatml"])
    texts = [{"instruction": f"say {number}", "output": f"{number} " * (1 + number)} for number in range(8)]
    settings = data_config(train__path=str(write_jsonl(folder / "rows.jsonl", texts)))
    ready = ensure_prepared(settings, tokenizer_folder=folder, cache=folder / "cache", seed=0, say=lambda _: None)
    return PreparedRows.open(ready.train)


def same(batch: Batch, other: Batch) -> bool:
    return torch.equal(batch.input_ids_BT, other.input_ids_BT) and torch.equal(batch.labels_BT, other.labels_BT)


def test_the_next_batch_is_made_beside_the_present_one(rows: PreparedRows) -> None:
    watched = Watched(rows)
    batches = Batches(watched, CPU)
    steps = [[0, 3], [1, 2], [5, -1]]
    for indices, then in zip(steps, [*steps[1:], None], strict=True):
        assert same(batches.take(indices, then=then), rows.batch(indices))
    batches.close()
    assert watched.made == [((0, 3), True), ((1, 2), False), ((5, -1), False)]


def test_a_batch_that_nobody_expected_is_made_all_the_same(rows: PreparedRows) -> None:
    """After a rollback the next step is another one."""
    batches = Batches(rows, CPU)
    batches.take([0, 1], then=[2, 3])
    assert same(batches.take([4, 5], then=[6]), rows.batch([4, 5]))
    assert same(batches.take([6]), rows.batch([6]))
    batches.close()


def test_rows_that_a_step_makes_are_not_asked_for_before_it(rows: PreparedRows) -> None:
    watched = Watched(rows)
    batches = Batches(watched, CPU, reads_ahead=False)
    batches.take([0], then=[1])
    batches.take([1])
    batches.close()
    assert watched.made == [((0,), True), ((1,), True)]


def test_an_error_comes_with_the_batch_that_it_belongs_to(rows: PreparedRows) -> None:
    batches = Batches(Watched(rows), CPU)
    assert same(batches.take([0], then=[99]), rows.batch([0]))
    with pytest.raises(DataError, match="row 99"):
        batches.take([99])
    assert same(batches.take([1]), rows.batch([1]))
    batches.close()
