"""The record: whole lines, healed tails, replayed steps, followers."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from orchestrator.errors import RunFolderError
from orchestrator.metrics.jsonl import RecordFile, Tail, follow, last_attempt_rows, number_of, read_rows


def test_rows_round_trip_in_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [
        {"step": 1, "loss": 2.5, "mfu": None, "text": "grüß\nGott\u2028"},
        {"step": 2, "loss": float("nan"), "grad_norm": float("inf"), "nested": {"low": [float("-inf"), 1]}},
    ]
    with RecordFile(path) as record:
        for row in rows:
            record.append(row)

    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is no JSON")

    lines = path.read_text(encoding="utf-8").split("\n")
    assert len(lines) == 3 and lines[2] == ""
    assert json.loads(lines[1], parse_constant=refuse)["loss"] == "NaN"
    first, second = read_rows(path)
    assert first == rows[0]
    assert math.isnan(number_of(second, "loss") or 0)
    assert second["grad_norm"] == math.inf and second["nested"] == {"low": [-math.inf, 1]}


@pytest.mark.parametrize(
    ("tail", "steps"),
    [
        (b'{"step": 3, "lo', [1, 2]),
        (b'{"step": 3}', [1, 2, 3]),
        (b"\0" * 200_000, [1, 2]),
        (b"", [1, 2]),
        (b"12", [1, 2]),
    ],
)
def test_a_torn_last_line_is_mended_when_the_next_writer_opens(tmp_path: Path, tail: bytes, steps: list[int]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + tail)
    assert [row["step"] for row in read_rows(path)] == steps
    with RecordFile(path) as record:
        record.append({"step": 9})
    assert [row["step"] for row in read_rows(path)] == [*steps, 9]
    assert path.read_bytes().endswith(b"\n") and b"\0" not in path.read_bytes()


def test_a_file_that_is_one_torn_line_becomes_empty(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "text": "' + b"x" * 200_000)
    assert read_rows(path) == []
    RecordFile(path).close()
    assert path.read_bytes() == b""


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl:2 is not a JSON object"):
        read_rows(path)
    assert [row["step"] for row in Tail(path).poll()] == [1, 3]


def test_a_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "none.jsonl") == []
    assert Tail(tmp_path / "none.jsonl").poll() == []


def test_a_killed_writer_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = (
        "import sys; from pathlib import Path; from orchestrator.metrics.jsonl import RecordFile\n"
        "record = RecordFile(Path(sys.argv[1]))\n"
        "for step in range(10**9): record.append({'step': step, 'text': 'x' * 500})"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ) as writer:
        while len(read_rows(path)) < 100:
            time.sleep(0.01)
        writer.send_signal(signal.SIGKILL)
    rows = read_rows(path)
    assert [row["step"] for row in rows] == list(range(len(rows)))


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    """A limit on the file size stands in for the disk: the write comes back short, then fails."""
    path = tmp_path / "metrics.jsonl"
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with RecordFile(path) as record:
            record.append({"step": 1})
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, old[1]))
            with pytest.raises(OSError, match="File too large"):
                record.append({"step": 2, "text": "x" * 300})
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
            record.append({"step": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert [row["step"] for row in read_rows(path)] == [1, 3]


def test_the_last_attempt_counts() -> None:
    def row(step: int, attempt: int, **more: object) -> dict[str, object]:
        return {"step": step, "attempt": attempt, **more}

    rows = [
        row(1, 1, loss=1.0), row(2, 1, loss=2.0), row(2, 1, eval_loss=2.5), row(3, 1, loss=3.0), row(4, 1, loss=4.0),
        {"note": "no step"},
        row(2, 2, loss=2.1), row(3, 2, loss=3.1), row(3, 2, eval_loss=3.6),
    ]  # fmt: skip
    assert last_attempt_rows(rows) == [rows[0], rows[6], rows[7], rows[8], rows[4]]


def test_followers_see_every_row_once_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    done = threading.Event()

    def write() -> None:
        with RecordFile(path) as record:
            for step in range(200):
                record.append({"step": step})
                time.sleep(0.0005)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    steps = [row["step"] for row in follow(path, stop=done.is_set, poll_seconds=0.005)]
    writer.join()
    assert steps == list(range(200))
    offset = path.read_bytes().index(b'{"step": 150}')
    assert [row["step"] for row in follow(path, from_offset=offset, stop=done.is_set)] == list(range(150, 200))


def test_a_tail_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st')
    tail = Tail(path)
    assert tail.poll() == [{"step": 1}]
    assert tail.poll() == []
    with open(path, "ab") as file:
        file.write(b'ep": 2}\n')
    assert tail.poll() == [{"step": 2}]
