"""A run that was cut, then copied and moved: each goes on from its checkpoint, in its own folder, to the same bits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from bench import Bench, Done, make_bench

from orchestrator.files.atomic import read_json, write_json
from orchestrator.metrics.jsonl import read_rows
from orchestrator.run_folder.folder import RunFolder

SAVES = ("stages.sft.checkpoint.every_steps=2", "launcher=local")
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def straight(bench: Bench) -> bytes:
    """The adapter of the run that was never cut."""
    done = bench.run("straight", *SAVES)
    assert done.code == 0, done.told
    return (done.sft.artifact / ADAPTER).read_bytes()


@pytest.fixture(scope="module")
def cut(bench: Bench) -> RunFolder:
    """Saved at step 4 of 6; the others are copies of it."""
    done = bench.run("cut", *SAVES, "stages.sft.pause_at_step=4")
    assert done.code == 75, done.told
    record = read_json(done.folder.run)
    record["config"]["stages"]["sft"]["pause_at_step"] = None
    write_json(done.folder.run, record)
    return done.folder


def resumed(bench: Bench, folder: Path) -> Done:
    done = bench.run(folder.name, verb="resume", words=[str(folder)])
    assert done.code == 0, done.told
    return done


def test_a_copy_and_a_moved_run_end_as_the_straight_one(bench: Bench, straight: bytes, cut: RunFolder) -> None:
    before = sorted(path.name for path in bench.runs.iterdir())
    copy = bench.root / "elsewhere" / "a copy"
    shutil.copytree(cut.root, copy)
    told = resumed(bench, copy).out
    assert f"the run is a copy of {cut.root} and continues independently of it" in told
    assert (copy / "sft" / "artifact" / ADAPTER).read_bytes() == straight
    steps = [
        row["step"]
        for row in read_rows(RunFolder(copy).stage("sft").metrics)
        if row.get("attempt") == 2 and "loss" in row
    ]
    assert steps == [5, 6], "from the checkpoint"
    assert not cut.stage("sft").result.exists() and sorted(path.name for path in bench.runs.iterdir()) == before
    moved = bench.runs / "moved"
    cut.root.rename(moved)
    assert f"the run was moved here from {cut.root}" in resumed(bench, moved).out
    assert (moved / "sft" / "artifact" / ADAPTER).read_bytes() == straight
    assert not cut.root.exists(), "nothing is written where the run was"
    (bench.root / "rows.jsonl").unlink()
    again = resumed(bench, moved)  # what is finished needs its data no more
    assert again.out == f"sft: done already; its result is {moved}/sft/result.json\n"
