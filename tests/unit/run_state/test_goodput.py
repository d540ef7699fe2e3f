"""How the wall-clock of a stage was spent, from records made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.display.plan_vs_actual_table import spent_words
from orchestrator.metrics.jsonl import RecordFile
from orchestrator.run_folder.folder import StageFolder
from orchestrator.run_state.goodput import time_spent

EVENTS: list[dict[str, Any]] = [
    {"event": "start", "attempt": 1, "time": 8, "began": 0},
    {"event": "train", "attempt": 1, "time": 12},
    {"event": "save", "attempt": 1, "time": 33, "step": 2, "save_seconds": 5, "save_stall_seconds": 1},
    {"event": "start", "attempt": 2, "time": 108, "began": 100},
    {"event": "train", "attempt": 2, "time": 110},
    {"event": "save", "attempt": 2, "time": 151, "step": 6, "save_seconds": 5, "save_stall_seconds": 1},
    {"event": "trained", "attempt": 2, "time": 156, "close_seconds": 4},
    {"event": "finish", "attempt": 2, "time": 178},
]
"""Killed after step 4 with the checkpoint of step 2: steps 3 and 4 are done twice, the first time in one row."""
METRICS: list[dict[str, Any]] = [
    {"step": 0, "attempt": 1, "time": 11, "eval_loss": 3.0, "eval_seconds": 2},
    {"step": 2, "attempt": 1, "time": 32, "step_seconds": 10, "num_steps": 2, "rollout_seconds": 0},
    {"step": 4, "attempt": 1, "time": 53, "step_seconds": 10, "num_steps": 2, "rollout_seconds": 0},
    {"step": 4, "attempt": 2, "time": 130, "step_seconds": 10, "num_steps": 2, "rollout_seconds": 0},
    {"step": 6, "attempt": 2, "time": 150, "step_seconds": 10, "num_steps": 2, "rollout_seconds": 0},
    {"step": 6, "attempt": 2, "time": 158, "eval_loss": 2.0, "eval_seconds": 2},
]


def written(folder: Path, events: list[dict[str, Any]], metrics: list[dict[str, Any]]) -> StageFolder:
    files = StageFolder(folder)
    for path, rows in ((files.events, events), (files.metrics, metrics)):
        with RecordFile(path) as file:
            for row in rows:
                file.append(row)
    return files


def test_a_killed_and_resumed_stage_by_hand(tmp_path: Path) -> None:
    spent = time_spent(written(tmp_path, EVENTS, METRICS))
    assert spent is not None
    assert (spent.startup, spent.training, spent.replayed) == (10 + 10, 60, 20)
    assert (spent.evaluation, spent.saving, spent.rollout) == (4, 1 + 1 + 4, 0)
    assert (spent.proof, spent.gaps) == (20, 100 - 53)
    assert spent.wall_seconds == 178 and spent.other == 178 - (20 + 60 + 20 + 4 + 6 + 20 + 47) == 1
    assert spent.goodput == pytest.approx(60 / 178)
    assert spent_words(spent).startswith("3 min: training 34%, gaps 26%, startup 11%")
    assert spent.to_json()["training_seconds"] == 60


def test_rollouts_of_steps_that_counted_are_work(tmp_path: Path) -> None:
    rows = [{**row, "rollout_seconds": 4} if "step_seconds" in row else row for row in METRICS]
    spent = time_spent(written(tmp_path, EVENTS, rows))
    assert spent is not None
    assert (spent.rollout, spent.replayed) == (12, 24) and spent.goodput == pytest.approx(72 / 178)


def test_rolled_back_steps_are_replayed(tmp_path: Path) -> None:
    turn = {"step": 2, "attempt": 1, "time": 60, "step_seconds": 10, "num_steps": 2, "rollbacks": 1}
    back = {"event": "roll_back", "attempt": 1, "time": 54, "seconds": 3}
    spent = time_spent(written(tmp_path, [*EVENTS[:3], back], [*METRICS[:3], turn]))
    assert spent is not None
    assert (spent.training, spent.replayed) == (40, 20 + 3)


def test_a_proof_in_an_attempt_of_its_own_is_no_startup(tmp_path: Path) -> None:
    killed = [*EVENTS[:-1], {"event": "written", "attempt": 2, "time": 160}]
    proven = [
        {"event": "prove", "attempt": 3, "time": 205, "began": 200},
        {"event": "finish", "attempt": 3, "time": 212},
    ]
    spent = time_spent(written(tmp_path, [*killed, *proven], METRICS))
    assert spent is not None
    assert (spent.startup, spent.proof, spent.gaps) == (20, 2 + 12, 47 + 40) and spent.wall_seconds == 212


def test_a_stage_that_never_started_has_spent_nothing(tmp_path: Path) -> None:
    assert time_spent(StageFolder(tmp_path)) is None
    died = time_spent(written(tmp_path, EVENTS[:1], []))
    assert died is not None and (died.startup, died.goodput) == (8, 0)
