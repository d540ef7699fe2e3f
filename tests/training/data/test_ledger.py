"""The ledger of rows: exactly once over an epoch, across restarts and world sizes, proven from what the ranks wrote."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from data_parts import FAMILIES, data_config, write_jsonl, write_tokenizer

from orchestrator.data.ledger import Ledger, audit, counted_steps, ledger_path, read_ledgers
from orchestrator.data.order import Order, make_order
from orchestrator.data.preparation.prepare import ensure_prepared
from orchestrator.data.prepared.folder import PreparedFolder


def rows_of_step(folder: Path, rows: PreparedFolder, step: int) -> tuple[int, ...]:
    """The source rows that a step trained on, over all ranks, in the order of the ranks."""
    entries = sorted(counted_steps(read_ledgers(folder)).get(step, []), key=lambda entry: entry.rank)
    return tuple(source for entry in entries for index in entry.rows for source in rows.row_ids(index))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> PreparedFolder:
    folder = tmp_path_factory.mktemp("ledger")
    data = write_jsonl(
        folder / "rows.jsonl", [{"instruction": f"{i}?", "output": "yes " * (1 + i % 9)} for i in range(50)]
    )
    config = data_config(train__path=str(data), eval__path="none", packing="best_fit", max_length=64)
    tokenizer = write_tokenizer(folder / "t", FAMILIES["chatml"])
    found = ensure_prepared(
        config, tokenizer_folder=tokenizer, cache=folder / "cache", seed=0, say=lambda sentence: None
    )
    return PreparedFolder(found.train)


def train(
    folder: Path, order: Order, *, attempt: int, world_size: int, first: int, last: int, torn: bool = False
) -> None:
    """What the ranks of one attempt write for steps first..last."""
    for rank in range(world_size):
        ledger = Ledger(ledger_path(folder, rank), attempt=attempt, rank=rank, world_size=world_size)
        for step in range(first, last + 1):
            batches = order.micro_batches(step - 1, rank=rank, world_size=world_size, micro_size=1)
            ledger.record(step, [row for batch in batches for row in batch.tolist()])
        ledger.close()
        if torn:
            with ledger_path(folder, rank).open("a") as file:
                file.write('{"step":99,"att')


def test_exactly_once_over_restarts_and_world_sizes(rows: PreparedFolder, tmp_path: Path) -> None:
    order = make_order(data_config(), lengths=rows.lengths, global_size=4, seed=0)
    per_epoch = order.steps_per_epoch
    train(tmp_path, order, attempt=1, world_size=2, first=1, last=per_epoch - 1, torn=True)
    train(tmp_path, order, attempt=2, world_size=1, first=3, last=per_epoch + 1)
    train(tmp_path, order, attempt=3, world_size=4, first=per_epoch + 1, last=2 * per_epoch)
    found = audit(tmp_path, rows, steps_per_epoch=per_epoch)
    assert found.is_exact, found.problems
    assert (found.steps, found.whole_epochs, found.attempts, found.world_sizes) == (
        2 * per_epoch,
        2,
        (1, 2, 3),
        (1, 2, 4),
    )
    assert found.replayed_steps == (per_epoch - 1 - 2) + 1
    first_epoch = [source for step in range(1, per_epoch + 1) for source in rows_of_step(tmp_path, rows, step)]
    assert sorted(first_epoch) == list(range(50))


def test_what_is_wrong_is_named(rows: PreparedFolder, tmp_path: Path) -> None:
    order = make_order(data_config(), lengths=rows.lengths, global_size=4, seed=0)
    per_epoch = order.steps_per_epoch
    train(tmp_path / "gap", order, attempt=1, world_size=2, first=2, last=per_epoch)
    assert "step 1 is in no ledger" in audit(tmp_path / "gap", rows, steps_per_epoch=per_epoch).problems[0]
    train(tmp_path / "rank", order, attempt=1, world_size=2, first=1, last=per_epoch)
    ledger_path(tmp_path / "rank", 1).unlink()
    assert "ranks [0] of 2 wrote" in audit(tmp_path / "rank", rows, steps_per_epoch=per_epoch).problems[0]
    other = make_order(data_config(), lengths=rows.lengths, global_size=4, seed=1)
    train(tmp_path / "order", order, attempt=1, world_size=1, first=1, last=2)
    train(tmp_path / "order", other, attempt=2, world_size=1, first=3, last=per_epoch)
    found = audit(tmp_path / "order", rows, steps_per_epoch=per_epoch)
    assert not found.is_exact
    assert any("was taken 2 times" in problem for problem in found.problems) and any(
        "was never taken" in problem for problem in found.problems
    )
    skipped = audit(tmp_path / "gap", rows, steps_per_epoch=per_epoch, skipped_steps=frozenset({1}))
    assert skipped.is_exact


def test_two_ranks_with_a_short_time_out_and_a_slow_tokenizer_pass(tmp_path: Path) -> None:
    """Nothing is tokenised inside a process group: a pass longer than its time-out does no harm, and uneven rows end."""
    write_tokenizer(tmp_path / "tokenizer", FAMILIES["chatml"])
    write_jsonl(tmp_path / "rows.jsonl", [{"instruction": f"{i}?", "output": "yes " * (1 + i % 9)} for i in range(30)])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(Path(__file__).with_name("rank_prepare.py")), str(tmp_path), "6.5"]
    ranks = [
        subprocess.Popen(
            command, env={**shared, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    answers = []
    for process in ranks:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        answers.append(json.loads(out.splitlines()[-1]))
    assert all(answer["exact"] and answer["waited"] > 6 for answer in answers) and answers[0]["rows"] % 4 != 0
