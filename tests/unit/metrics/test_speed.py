"""One definition of a run's speed: the newest attempt, without its warm-up, in the middle."""

from orchestrator.metrics.speed import run_speed, timed_rows


def _rows(attempt: int, *speeds: float) -> list[dict[str, object]]:
    return [{"attempt": attempt, "step": step, "tokens_per_second": speed} for step, speed in enumerate(speeds, 1)]


def test_the_first_rows_of_an_attempt_are_left_out() -> None:
    assert run_speed(_rows(1, 1.0, 2.0, 30.0, 50.0, 40.0)) == 40.0
    assert run_speed(_rows(1, 1.0, 2.0, 30.0, 40.0)) == 35.0


def test_only_the_newest_attempt_counts() -> None:
    rows = [*_rows(1, 900.0, 900.0, 900.0, 900.0), *_rows(2, 1.0, 2.0, 30.0)]
    assert run_speed(rows) == 30.0 and [row["attempt"] for row in timed_rows(rows)] == [2]


def test_a_short_attempt_has_the_speed_of_its_last_row() -> None:
    assert run_speed(_rows(1, 5.0)) == 5.0 and run_speed(_rows(1, 5.0, 7.0)) == 7.0


def test_rows_of_evaluations_have_no_speed() -> None:
    assert run_speed([{"step": 0, "attempt": 1, "eval_loss": 3.0}]) is None
