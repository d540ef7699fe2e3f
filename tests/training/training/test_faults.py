"""What goes wrong in the middle of a run: NaN losses, stop requests, kills, a full disk."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rank_runs import STEPS, Cell, Place, command, crash, environment, make_place, train
from safetensors.torch import load_file

from orchestrator.run_folder import checkpoints

LORA = ("tuning=lora", "tuning.rank=4", "tuning.dropout=0.2")
SHARDINGS = ("none", "zero1", "zero2", "zero3")
EVALUATING = "stages.sft.evaluate_every_steps=5"
MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """At two ranks: runs that meet NaN losses, one that is asked to stop, and the same ones undisturbed."""
    place = make_place(tmp_path_factory.mktemp("faults"))
    cells: list[Cell] = []
    for sharding in SHARDINGS:
        words = ("tuning=full", f"sharding={sharding}")
        cells.append(Cell(run=str(place.make(f"one-{sharding}", *words, ranks=2)), poison=(5,)))
        cells.append(Cell(run=str(place.make(f"three-{sharding}", *words, ranks=2)), poison=(5, 6, 7)))
    strict = ("tuning=full", "stages.sft.faults.max_rollbacks=0")
    cells += [
        Cell(run=str(place.make("straight", *LORA, "sharding=zero2", ranks=2))),
        Cell(run=str(place.make("stopped", *LORA, "sharding=zero2", ranks=2)), stop=("step", 3)),
        Cell(run=str(place.make("stopped-1", *LORA, "sharding=none", ranks=2)), stop=("step", 1)),
        Cell(run=str(place.make("stopped-5", *LORA, EVALUATING, ranks=2)), stop=("evaluation", 5)),
        Cell(run=str(place.make("stopped-4", *LORA, ranks=2)), stop=("save", 4)),
        Cell(
            run=str(place.make("first", "tuning=full", ranks=2)),
            poison=(1, 2, 3),
            expect="there is no earlier checkpoint",
        ),
        Cell(run=str(place.make("bounded", *strict, ranks=2)), poison=(5, 6, 7), expect="faults.max_rollbacks is 0"),
    ]
    train(place, cells, ranks=2)
    return place


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_one_nan_skips_one_update_on_all_ranks_alike(place: Place, sharding: str) -> None:
    rows, reference = place.rows(f"one-{sharding}"), place.rows("one-none")
    assert [rows[step]["skipped_updates"] for step in (4, 5, 6, 8)] == [0, 1, 1, 1]
    assert rows[5]["loss"] != rows[5]["loss"], "NaN"
    for step in (1, 4, 6, 7, 8):
        assert rows[step]["loss"] == pytest.approx(reference[step]["loss"], rel=1e-6)
    (event,) = place.events(f"one-{sharding}", "skip")
    assert (event["step"], event["why"], len(event["rows"])) == (5, "the loss is nan", 8)  # type: ignore[arg-type]


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_three_nans_go_back_and_leave_their_data_out(place: Place, sharding: str) -> None:
    run = f"three-{sharding}"
    (event,) = place.events(run, "roll_back")
    assert (event["from_step"], event["to_step"], event["omitted_steps"]) == (7, 4, [5, 6, 7])
    rows, one = place.rows(run), place.rows("one-none")
    assert rows[4]["loss"] == pytest.approx(one[4]["loss"], rel=1e-6)
    assert rows[8]["loss"] == pytest.approx(place.rows("three-none")[8]["loss"], rel=1e-6)
    assert [event["step"] for event in place.events(run, "save")] == [2, 4, 6, 8], "none at 6 before the rollback"
    weights = load_file(place.run(run) / "weights-1.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
    found, _ = checkpoints.newest_valid(place.stage(run))
    assert found is not None and found.state["progress"]["health"]["omitted"] == [5, 6, 7]


@pytest.mark.parametrize(("name", "steps"), [("stopped", 3), ("stopped-1", 0), ("stopped-5", 5), ("stopped-4", 5)])
def test_a_wish_of_one_rank_stops_and_saves_all(place: Place, name: str, steps: int) -> None:
    """Before step 1 nothing is there to save; in an evaluation the step before it is saved; in a save the next step is."""
    assert sorted(place.rows(name)) == list(range(1, steps + 1))
    found, _ = checkpoints.newest_valid(place.stage(name))
    assert (found.step if found else 0) == steps


@pytest.fixture(scope="module")
def killed(place: Place) -> Place:
    """Killed in the middle of a step, of an evaluation; stopped; and all gone on with."""
    for kind in ("accumulation", "evaluation"):
        run = place.make(kind, *LORA, "sharding=zero2", *((EVALUATING,) if kind == "evaluation" else ()), ranks=2)
        crash(place, Cell(run=str(run), die=(kind, 5)), ranks=2)
        assert 2 in checkpoints.saved_steps(place.stage(kind)), "that of step 4 may still be on its way"
    _kill_in_a_save(place, Cell(run=str(place.make("save", *LORA, "sharding=zero2", ranks=2))))
    cells = [Cell(run=str(place.run(name)), attempt=2) for name in ("accumulation", "evaluation", "save", "stopped")]
    train(place, cells, ranks=2)
    return place


def _kill_in_a_save(place: Place, cell: Cell) -> None:
    """At a random moment of the second save; `benchmarks/kills.py` does it twenty-five times."""
    folder = place.stage("save").checkpoints
    running = subprocess.Popen(
        command([cell], ranks=2), env=environment(place), cwd=place.root, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (list(folder.glob("step-*")) and list(folder.glob(".step-*.partial"))):
        assert running.poll() is None and time.monotonic() < deadline, "no save was seen"
    time.sleep(random.Random().uniform(0, 0.01))
    os.killpg(running.pid, signal.SIGKILL)
    _kill_ranks(cell.run)
    running.wait()


def _kill_ranks(run: str) -> None:
    """torchrun puts its ranks into sessions of their own."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if run.encode() in (folder / "cmdline").read_bytes() and int(folder.name) != os.getpid():
                os.kill(int(folder.name), signal.SIGKILL)
        except OSError:
            continue


@pytest.mark.parametrize(
    ("name", "first_steps"), [("accumulation", (3, 5)), ("evaluation", (3, 5)), ("save", (3, 5, 7)), ("stopped", (4,))]
)
def test_a_killed_or_stopped_run_ends_as_if_nothing_had_happened(
    killed: Place, name: str, first_steps: tuple[int, ...]
) -> None:
    _assert_bit_equal(killed, name, attempt=2)
    (event,) = killed.events(name, "resume")
    second = [row["step"] for row in killed.rows(name).values() if row["attempt"] == 2]
    assert second[0] in first_steps and second == list(range(int(str(event["step"])) + 1, STEPS + 1))


def _assert_bit_equal(place: Place, name: str, *, attempt: int) -> None:
    rows, straight = place.rows(name), place.rows("straight")
    assert sorted(rows) == sorted(straight)
    for step, row in rows.items():
        for key in ("loss", "grad_norm", "lr", "rows_digest"):
            assert row[key] == straight[step][key], (step, key)
    one = load_file(place.run("straight") / "weights-1.safetensors")
    other = load_file(place.run(name) / f"weights-{attempt}.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Place]:
    """A file system of three MiB under all that the run `full` writes: checkpoints, metrics, events."""
    if os.geteuid() != 0:
        pytest.skip("a small file system needs root")
    place = make_place(tmp_path)
    folder = place.stage("full").root
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("this machine mounts nothing")
    yield place
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_stops_no_training(small_disk: Place) -> None:
    """Space for one checkpoint: the second fails until somebody makes room; every later one is written again."""
    words = (
        "tuning=full",
        "stages.sft.checkpoint.keep_last=1",
        "stages.sft.checkpoint.retries=400",
        "stages.sft.checkpoint.retry_seconds=0.05",
    )
    place = small_disk
    run = place.make("full", *words, ranks=1)
    place.make("roomy", "tuning=full", ranks=1)
    ballast = place.stage("full").root / "ballast"
    ballast.write_bytes(b"0" * int(2.3 * MEBIBYTE))
    running = subprocess.Popen(
        command([Cell(run=str(run)), Cell(run=str(place.run("roomy")))], ranks=1), env=environment(place), cwd=place.root,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not place.events("full", "save_failed"):
        assert running.poll() is None and time.monotonic() < deadline, "the disk never filled"
        time.sleep(0.02)
    ballast.unlink()
    assert running.wait(120) == 0
    failed = place.events("full", "save_failed")
    assert "No space left on device" in str(failed[0]["why"])
    assert [event["step"] for event in place.events("full", "save")][-1] == STEPS
    assert checkpoints.saved_steps(place.stage("full")) == [STEPS]
    rows, roomy = place.rows("full"), place.rows("roomy")
    assert [rows[step]["loss"] for step in range(1, STEPS + 1)] == [roomy[step]["loss"] for step in range(1, STEPS + 1)]
