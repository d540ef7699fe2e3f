"""What comes after an attempt: decided from the run's files; a stop is no failure, a user's mistake is never tried again."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.composition.compose import compose
from orchestrator.config.run import RunConfig
from orchestrator.errors import CheckpointError, ConfigError, DataError, TrainingFailed
from orchestrator.files.atomic import write_json
from orchestrator.run_folder.folder import RunFolder, StageFolder
from orchestrator.run_state import attempts
from orchestrator.run_state.attempts import (
    Attempt,
    Decision,
    State,
    close_attempt,
    decide,
    next_attempt,
    read_attempts,
    write_attempt,
    write_fault,
)

MAX_FAILURES, MAX_PREEMPTIONS = 2, 4


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return compose(
        [
            "+experiment=llama_lora",
            f"launcher.max_failures={MAX_FAILURES}",
            f"launcher.max_preemptions={MAX_PREEMPTIONS}",
        ]
    )


@pytest.fixture
def stage(tmp_path: Path, config: RunConfig) -> StageFolder:
    run = RunFolder(tmp_path / "run")
    write_json(run.run, {"config": config.model_dump(mode="json")})
    return run.stage("sft")


def attempt(number: int, state: State, *, code: int = 1, step: int | None = None) -> Attempt:
    return Attempt(number=number, state=state, why=f"because {number}", host="here", rank=0, exit_code=code, step=step)


def after(stage: StageFolder, config: RunConfig, *history: Attempt) -> Decision:
    for entry in history:
        write_attempt(stage, entry)
    return decide(stage, config, history[-1])


TABLE: dict[str, tuple[list[tuple[State, int, int | None]], str, int]] = {
    "a first crash is tried again": ([("failed", 1, 10)], "retry", 1),
    "a crash that got further is tried again": ([("failed", 1, 10), ("failed", 1, 11)], "retry", 1),
    "two crashes at one step are no progress": ([("failed", 1, 10), ("failed", 1, 10)], "stop", 93),
    "two crashes before the first step are no progress": ([("failed", 1, None), ("failed", 1, None)], "stop", 93),
    "a stop between two crashes breaks the row": (
        [("failed", 1, 10), ("stopped", 75, 10), ("failed", 1, 10)],
        "retry",
        1,
    ),
    "the budget of failures": ([("failed", 1, 1), ("failed", 1, 2), ("failed", 1, 3)], "stop", 93),
    "stops do not use the budget of failures": (
        [("stopped", 75, 1), ("stopped", 75, 2), ("stopped", 75, 3), ("failed", 1, 4)],
        "retry",
        1,
    ),
    "a stop goes on": ([("stopped", 75, 5)], "requeue", 75),
    "a stop without progress goes on": ([("stopped", 75, 5), ("stopped", 75, 5)], "requeue", 75),
    "the budget of stops, used up": ([("stopped", 75, step) for step in range(MAX_PREEMPTIONS)], "requeue", 75),
    "the budget of stops, passed": ([("stopped", 75, step) for step in range(MAX_PREEMPTIONS + 1)], "stop", 93),
    "a user's mistake": ([("failed", 2, None)], "stop", 2),
    "a failed proof": ([("failed", 93, 60)], "stop", 93),
    "a kill": ([("failed", 137, 3)], "retry", 1),
    "an end that left no result": ([("finished", 0, 60)], "retry", 1),
}


@pytest.mark.parametrize("case", TABLE)
def test_the_decision_table(stage: StageFolder, config: RunConfig, case: str) -> None:
    history, word, code = TABLE[case]
    decision = after(
        stage, config, *(attempt(n, state, code=c, step=step) for n, (state, c, step) in enumerate(history, start=1))
    )
    assert (decision.word, decision.exit_code) == (word, code)
    assert decision.why


@pytest.mark.parametrize("state", ["finished", "stopped", "failed"])
def test_a_result_is_the_end_whatever_the_attempt_says(stage: StageFolder, config: RunConfig, state: State) -> None:
    write_json(stage.result, {})
    assert after(stage, config, attempt(1, state)) == Decision(word="finished", why="result.json is there", exit_code=0)


def test_an_attempt_that_recorded_its_end_keeps_its_record(stage: StageFolder) -> None:
    write_attempt(stage, attempt(3, "stopped", code=75, step=8))
    assert close_attempt(stage, 3, 1, outside_cause="torchrun said 1") == attempt(3, "stopped", code=75, step=8)


@pytest.mark.parametrize(
    ("error", "code", "why"),
    [
        (ConfigError(["one", "two"]), 2, "one\ntwo"),
        (DataError("rows.jsonl:3 output"), 2, "rows.jsonl:3 output"),
        (CheckpointError("torn"), 93, "torn"),
        (TrainingFailed("loss is NaN"), 93, "loss is NaN"),
        (ValueError("x"), 1, "ValueError: x"),
        (MemoryError(), 1, "MemoryError: "),
    ],
)
def test_the_words_of_a_dying_rank_close_the_attempt(
    stage: StageFolder, error: BaseException, code: int, why: str
) -> None:
    write_fault(stage, 1, 1, error, 7)
    time.sleep(0.01)
    write_fault(stage, 1, 0, RuntimeError("the other rank is gone"), 7)
    closed = close_attempt(stage, 1, 1)
    assert (closed.state, closed.exit_code, closed.why, closed.rank, closed.step) == ("failed", code, why, 1, 7)
    assert read_attempts(stage) == [closed]


def test_a_death_without_a_word_is_described_by_what_is_known(stage: StageFolder) -> None:
    stage.root.mkdir(parents=True)
    rows = [
        '{"step": 4, "attempt": 1, "loss": 1.0}',
        '{"step": 6, "attempt": 2, "loss": 1.0}',
        '{"step": 7, "attempt": 2, "eval_loss": 1}',
    ]
    stage.metrics.write_text("\n".join([*rows, '{"step": 8, "att']))
    closed = close_attempt(stage, 2, 137)
    assert (closed.state, closed.exit_code, closed.step) == ("failed", 137, 6)
    assert "exit code 137 without a message: killed from outside, or out of host memory" in closed.why
    assert close_attempt(stage, 3, 0, outside_cause="the node was lost").why == "the node was lost"
    assert read_attempts(stage)[-1].exit_code == 1  # an end without a result is no success


def test_numbers_of_attempts_count_faults_too(stage: StageFolder) -> None:
    assert next_attempt(stage) == 1
    write_attempt(stage, attempt(9, "failed"))
    write_fault(stage, 10, 0, ValueError("x"), None)
    assert next_attempt(stage) == 11
    assert [entry.number for entry in read_attempts(stage)] == [9]


def judged(stage: StageFolder, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = attempts.main([str(stage.root.parent), "sft", *words])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_the_launchers_question_is_answered_with_one_word(
    stage: StageFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert judged(stage, capsys, "--attempt", "1", "--exit-code", "1", "--cause", "the node was lost") == (
        1,
        "retry\n",
        "the node was lost\n",
    )
    write_attempt(stage, attempt(2, "stopped", code=75))
    assert judged(stage, capsys, "--attempt", "2", "--exit-code", "1")[:2] == (75, "requeue\n")
    write_json(stage.result, {})
    assert judged(stage, capsys, "--attempt", "3", "--exit-code", "1")[:2] == (0, "finished\n")


def test_a_run_folder_that_is_gone_is_not_tried_again(stage: StageFolder, capsys: pytest.CaptureFixture[str]) -> None:
    (stage.root.parent / "run.json").unlink()
    code, word, why = judged(stage, capsys, "--attempt", "1", "--exit-code", "1")
    assert (code, word) == (2, "stop\n") and "run.json is missing" in why


def test_the_question_needs_no_torch(stage: StageFolder) -> None:
    code = (
        "import sys; from orchestrator import attempts; "
        f"attempts.main([{str(stage.root.parent)!r}, 'sft', '--attempt', '1', '--exit-code', '1']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["retry", "False"]
