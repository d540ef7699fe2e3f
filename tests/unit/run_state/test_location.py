"""Moved, copied, linked and mounted run folders, told apart by path and inode; what stays with the original of a copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from orchestrator.composition.compose import compose
from orchestrator.files.atomic import read_json, write_json, write_text
from orchestrator.run_folder.folder import RunFolder
from orchestrator.run_state.attempts import decide, read_attempts
from orchestrator.run_state.location import locate, settle


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A stage that was begun, with a Slurm job, a W&B run and an open attempt."""
    run = RunFolder(tmp_path / "runs" / "first")
    config = compose(["+experiment=llama_lora", "name=first", f"output_dir={tmp_path / 'runs'}"])
    write_json(run.run, {"config": config.model_dump(mode="json")})
    stage = run.stage("sft")
    write_json(stage.submission, {"token": "t", "job": "12"})
    write_text(stage.jobs, "12\n")
    write_json(stage.wandb / "state.json", {"run_id": "abc"})
    write_text(stage.logs / "attempt-1" / "claim", "here 1 \n")
    return run


def begun(run: RunFolder) -> RunFolder:
    assert settle(run, ("sft",)) is None
    return run


def copy_of(run: RunFolder, name: str = "copy") -> RunFolder:
    return RunFolder(Path(shutil.copytree(run.root, run.root.with_name(name), symlinks=True)))


def test_a_run_stays_itself_where_it_is_and_through_a_link(run: RunFolder, tmp_path: Path) -> None:
    assert locate(run).kind == "new"
    begun(run)
    (tmp_path / "link").symlink_to(run.root)
    for path in (run.root, tmp_path / "link", Path("/proc/self/root") / run.root.relative_to("/")):
        assert locate(RunFolder(path)).kind == "here"
        assert settle(RunFolder(path), ("sft",)) is None


def test_a_moved_run_is_the_same_run(run: RunFolder) -> None:
    before = read_json(begun(run).location)
    moved = RunFolder(run.root.rename(run.root.with_name("second")))
    assert locate(moved).kind == "moved"
    assert settle(moved, ("sft",)) == f"the run was moved here from {run.root}; it continues as the same run"
    assert read_json(moved.location) == {**before, "path": str(moved.root)}
    assert moved.stage("sft").submission.exists() and moved.stage("sft").wandb.exists()
    assert settle(moved, ("sft",)) is None


@pytest.mark.parametrize("is_recorded", [True, False], ids=["recorded", "of an older version"])
def test_a_copy_leaves_what_belongs_to_its_original(run: RunFolder, is_recorded: bool) -> None:
    if is_recorded:
        begun(run)
    copy = copy_of(run)
    assert locate(copy).kind == "copied" and locate(run).kind != "copied"
    told = settle(copy, ("sft",))
    assert told == f"the run is a copy of {run.root} and continues independently of it; W&B gets a new run for sft"
    stage = copy.stage("sft")
    assert not stage.submission.exists() and not stage.jobs.exists() and not stage.wandb.exists()
    assert (stage.root / "wandb.of-original-1" / "state.json").exists()
    (attempt,) = read_attempts(stage)
    assert f"copied while this attempt ran in {run.root}" in attempt.why
    config = compose(["+experiment=llama_lora"])
    assert decide(stage, config, attempt).word == "retry", "the copy did not fail"
    assert settle(copy, ("sft",)) is None and locate(copy).kind == "here"
    if is_recorded:
        assert read_json(copy.location)["id"] != read_json(run.location)["id"]
    assert run.stage("sft").wandb.exists() and read_attempts(run.stage("sft")) == []


def test_a_copy_whose_original_is_out_of_sight_takes_no_chances(run: RunFolder) -> None:
    copy = copy_of(begun(run))
    shutil.rmtree(run.root)
    assert locate(copy).kind == "copied"


def test_a_copy_put_in_the_place_of_a_run_that_was_moved(run: RunFolder) -> None:
    """Both hold the same record now: the one elsewhere gives way."""
    moved = RunFolder(begun(run).root.rename(run.root.with_name("second")))
    shutil.copytree(moved.root, run.root)
    assert (locate(run).kind, locate(moved).kind) == ("here", "copied")


def test_a_finished_stage_of_a_copy_keeps_its_records(run: RunFolder) -> None:
    write_json(begun(run).stage("sft").result, {})
    copy = copy_of(run)
    assert settle(copy, ("sft",)) == f"the run is a copy of {run.root} and continues independently of it"
    assert copy.stage("sft").wandb.exists()
