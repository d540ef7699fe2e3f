"""What a process says of its phases: the file that a display follows, and the lines of a log."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from orchestrator.metrics.phases import PROOF, ROWS, STEPS, Phase, Phases, is_due, read_report


def test_the_file_names_the_phase_at_work_and_the_seconds_of_those_that_ended(tmp_path: Path) -> None:
    file = tmp_path / "sft" / "phases.json"
    phases = Phases(file, attempt=2, began=time.time())
    phases.begin("loading the model")
    phases.begin("training", total=6, unit=STEPS)
    with phases.during("saving a checkpoint"):
        inside = read_report(file)
        time.sleep(0.05)
    outside = read_report(file)
    phases.close()
    ended = read_report(file)
    assert inside is not None and outside is not None and ended is not None
    assert inside.attempt == 2 and inside.now is not None and inside.now.name == "saving a checkpoint"
    assert outside.now is not None and (outside.now.name, outside.now.total) == ("training", 6)
    assert ended.now is None and list(ended.seconds) == ["loading the model", "training", "saving a checkpoint"]
    assert ended.seconds["saving a checkpoint"] >= 0.05 > ended.seconds["training"], (
        "a nested phase is not counted twice"
    )


def test_a_count_moves_only_the_phase_that_counts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.metrics.phases._TICK_SECONDS", 0.05)
    phases = Phases(tmp_path / "phases.json")
    phases.begin("training", total=6, unit=STEPS)
    phases.advance(2, unit=STEPS)
    phases.advance(64, 64, unit=ROWS)  # a probe scores rows during the steps
    time.sleep(0.3)
    found = read_report(tmp_path / "phases.json")
    phases.close()
    assert found is not None and found.now is not None and (found.now.done, found.now.total) == (2, 6)


def test_a_phase_in_words() -> None:
    assert Phase(name="a", began=0.0, done=4, total=9, unit=ROWS).sentence(12.4) == "a, 4 of 9 rows, 12 s"
    assert Phase(name="a", began=0.0).sentence(3.0) == "a, 3 s"


def test_a_long_phase_is_heard_of_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.metrics.phases.FIRST_BEAT_SECONDS", 0.5)
    monkeypatch.setattr("orchestrator.metrics.phases._TICK_SECONDS", 0.05)
    said: list[str] = []
    phases = Phases(say=said.append)
    phases.begin("loading the model")
    time.sleep(0.9)
    phases.close()
    assert said[0] == "loading the model" and said[1].startswith("loading the model, "), said


def test_the_pauses_grow_from_five_seconds_to_a_minute() -> None:
    beats, spoke = [], 0.0
    for second in range(1, 400):
        if is_due(second - spoke, second):
            beats.append(second)
            spoke = second
    assert beats[:6] == [5, 10, 20, 40, 80, 140] and beats[-1] - beats[-2] == 60


def test_a_fresh_process_goes_on_with_the_phase_and_the_seconds_of_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "phases.json"
    first = Phases(file, attempt=3, began=time.time() - 100)
    first.begin("training", unit=STEPS)
    first.begin(PROOF, unit=ROWS)  # and here the process ends
    began = read_report(file)
    said: list[str] = []
    second = Phases(file, attempt=3, known=began, say=said.append)
    assert second.is_at(PROOF) and began is not None and second.began == began.began
    second.advance(3, 9)
    time.sleep(0.7)
    found = read_report(file)
    assert found is not None and found.now is not None and (found.now.done, found.now.total) == (3, 9)
    seconds = second.end()
    assert list(seconds) == ["training", PROOF] and seconds[PROOF] >= 0.7 and not said
    first.close()


def test_a_damaged_or_missing_file_is_no_report_and_a_disk_that_refuses_stops_nothing(tmp_path: Path) -> None:
    assert read_report(tmp_path / "phases.json") is None
    (tmp_path / "phases.json").write_text('{"attempt": 1')
    assert read_report(tmp_path / "phases.json") is None
    (tmp_path / "file").write_text("")
    phases = Phases(tmp_path / "file" / "phases.json")
    phases.begin("loading the model")
    phases.close()
