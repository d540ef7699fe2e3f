"""Which checkpoint is taken, refused, kept: on folders, without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.composition.compose import compose
from orchestrator.config.run import fitting_micro_size
from orchestrator.errors import ConfigError
from orchestrator.estimate.checkpoint_size import bytes_of_one, most_bytes
from orchestrator.files.manifest import MANIFEST
from orchestrator.run_folder import checkpoints
from orchestrator.run_folder.folder import StageFolder
from orchestrator.run_state.resume_rules import elsewhere, refuse_changes

RANKS = 2


def _save(folder: StageFolder, step: int, **facts: Any) -> Path:
    """A checkpoint of two ranks, made as the writer makes it."""
    partial = folder.checkpoint_partial(step)
    partial.mkdir(parents=True)
    files = {checkpoints.rank_file(rank): f"rank {rank} of step {step} ".encode() * 50 for rank in range(RANKS)}
    files[checkpoints.STATE] = json.dumps({"step": step}).encode()
    for name, content in files.items():
        (partial / name).write_bytes(content)
    entries = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()
    }
    checkpoints.commit(
        partial, folder.checkpoint(step), {"step": step, "world_size": RANKS, "eval_loss": None, **facts}, entries
    )
    return folder.checkpoint(step)


@pytest.fixture
def folder(tmp_path: Path) -> StageFolder:
    """Proven checkpoints of steps 2 and 4."""
    stage = StageFolder(tmp_path / "sft")
    _save(stage, 2)
    _save(stage, 4)
    return stage


def _flip_a_bit(newest: Path) -> None:
    path = newest / checkpoints.rank_file(1)
    content = bytearray(path.read_bytes())
    content[100] ^= 4
    path.write_bytes(content)


def _truncate(newest: Path) -> None:
    path = newest / checkpoints.rank_file(0)
    path.write_bytes(path.read_bytes()[:-1])


def _swap(newest: Path) -> None:
    one, other = (newest / checkpoints.rank_file(rank) for rank in range(RANKS))
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])


def _edit_manifest(change: Callable[[dict[str, Any]], None], *, sign: bool) -> Callable[[Path], None]:
    def damage(newest: Path) -> None:
        manifest = json.loads((newest / MANIFEST).read_text())
        change(manifest)
        if sign:
            del manifest["manifest_sha256"]
            manifest["manifest_sha256"] = checkpoints.digest_of(manifest)
        (newest / MANIFEST).write_text(json.dumps(manifest))

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit flip": (_flip_a_bit, "rank-00001.safetensors: its sha256 differs from the one that was written"),
    "truncation": (_truncate, "rank-00000.safetensors: 849 bytes, 850 were written"),
    "missing shard": (lambda newest: (newest / checkpoints.rank_file(1)).unlink(), "rank-00001.safetensors: missing"),
    "empty manifest": (lambda newest: (newest / MANIFEST).write_text(""), "is damaged or empty"),
    "no manifest": (lambda newest: (newest / MANIFEST).unlink(), "it was never finished"),
    "manifest of nothing": (lambda newest: (newest / MANIFEST).write_text("{}"), "is damaged or empty"),
    "torn manifest": (
        lambda newest: (newest / MANIFEST).write_text((newest / MANIFEST).read_text()[:200]),
        "is damaged or empty",
    ),
    "rank file not in the manifest": (
        _edit_manifest(lambda manifest: manifest["files"].pop(checkpoints.rank_file(1)), sign=True),
        "rank-00001.safetensors is not in the manifest, 2 ranks wrote it",
    ),
    "swapped files": (_swap, "its sha256 differs from the one that was written"),
    "wrong world size": (
        _edit_manifest(lambda manifest: manifest.update(world_size=1), sign=True),
        "rank-00001.safetensors is in the manifest, 1 ranks wrote it",
    ),
    "changed fact": (
        _edit_manifest(lambda manifest: manifest.update(step=40), sign=False),
        "does not agree with its own sha256",
    ),
    "another step": (_edit_manifest(lambda manifest: manifest.update(step=40), sign=True), "it holds step 40"),
    "later format": (
        _edit_manifest(lambda manifest: manifest.update(format=99), sign=True),
        "format 99, this version reads 1",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_it_taken(folder: StageFolder, name: str) -> None:
    damage, words = DAMAGES[name]
    damage(folder.checkpoint(4))
    found, refused = checkpoints.newest_valid(folder)
    assert found is not None and found.step == 2
    assert words in "\n".join(refused[4])
    assert folder.checkpoint(4).is_dir(), "looking changes nothing"


def test_quarantine_keeps_and_tells_everything(folder: StageFolder) -> None:
    told: list[dict[str, Any]] = []
    for _ in range(2):
        checkpoints.quarantine(folder, 4, ["bad"], lambda event, **facts: told.append({"event": event, **facts}))
        _save(folder, 4)
    assert sorted(path.name for path in folder.quarantine.iterdir()) == ["step-00000004.1", "step-00000004.2"]
    assert all((path / MANIFEST).is_file() for path in folder.quarantine.iterdir())
    assert [(fact["event"], fact["step"], fact["why"]) for fact in told] == [("quarantine", 4, ["bad"])] * 2


def test_what_a_kill_interrupted_is_ended(folder: StageFolder) -> None:
    folder.checkpoint_partial(6).mkdir()
    (folder.checkpoints / ".step-00000001.deleted").mkdir()
    folder.checkpoint(4).rename(folder.checkpoints / ".step-00000004.old")  # killed while step 4 was being replaced
    checkpoints.recover_interrupted_save(folder)
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step-00000002", "step-00000004"]
    found, refused = checkpoints.newest_valid(folder)
    assert found is not None and (found.step, refused) == (4, {})


def test_retention_keeps_the_newest_the_multiples_and_the_best() -> None:
    steps = [100, 200, 250, 300, 400, 450]
    assert checkpoints.expired_steps(steps, keep_last=2, keep_every=None, best=None) == [100, 200, 250, 300]
    assert checkpoints.expired_steps(steps, keep_last=1, keep_every=200, best=250) == [100, 300]
    assert checkpoints.expired_steps([100], keep_last=1, keep_every=None, best=None) == []


def test_the_best_checkpoint_is_the_one_with_the_lowest_held_out_loss(folder: StageFolder) -> None:
    assert checkpoints.best_step(folder) is None
    for step, loss in ((6, 1.5), (8, 1.2), (10, 1.2), (12, None)):
        _save(folder, step, eval_loss=loss)
    assert checkpoints.best_step(folder) == 8
    checkpoints.delete(folder, [4, 8])
    assert checkpoints.saved_steps(folder) == [2, 6, 10, 12]
    assert [path.name for path in folder.checkpoints.glob(".*")] == []


def test_a_changed_setting_is_refused_with_old_and_new_value_unless_accepted() -> None:
    old = {"stages.sft.optimizer.lr": 1e-3, "seeds.data": 0, "stages.sft.data": "ab12"}
    new = {"stages.sft.optimizer.lr": 2e-3, "seeds.data": 0, "stages.sft.data": "cd34"}
    with pytest.raises(ConfigError) as refused:
        refuse_changes(old, new, stage="sft", accepted=frozenset({"stages.sft.data"}))
    assert refused.value.problems == (
        "stages.sft.optimizer.lr: 0.001 in the checkpoint, 0.002 now",
        "repeat the old value, start a new run with name=, or type stages.sft.checkpoint.accept_changes=[stages.sft.optimizer.lr]",
    )
    accepted = frozenset({"stages.sft.data", "stages.sft.optimizer"})
    assert len(refuse_changes(old, new, stage="sft", accepted=accepted)) == 2


def test_micro_batches_are_derived_anew_for_another_number_of_ranks() -> None:
    assert fitting_micro_size(global_size=8, micro_size=4, world_size=1) == 4
    assert fitting_micro_size(global_size=8, micro_size=4, world_size=4) == 2
    assert fitting_micro_size(global_size=12, micro_size=4, world_size=2) == 3
    assert fitting_micro_size(global_size=8, micro_size=4, world_size=3) is None


def test_a_run_elsewhere_keeps_its_global_batch() -> None:
    values = {
        "cluster": {"nodes": 1, "processes_per_node": 2, "device": "cpu"},
        "stages": {"sft": {"batch": {"global_size": 8, "micro_size": 4}, "epochs": 3}},
        "name": "a",
    }
    moved, told = elsewhere(values, nodes=2, processes_per_node=2)
    assert moved["cluster"] == {"nodes": 2, "processes_per_node": 2, "device": "cpu"}
    assert moved["stages"] == {"sft": {"batch": {"global_size": 8, "micro_size": 2}, "epochs": 3}}
    assert told == ["sft: 4 ranks x 1 micro-batches x 2 rows = 8"]
    assert values["cluster"]["nodes"] == 1, "the frozen values stay"
    with pytest.raises(ConfigError, match="3 ranks cannot share 8 rows"):
        elsewhere(values, nodes=1, processes_per_node=3)


def test_the_disk_that_checkpoints_take_is_known_before() -> None:
    stage = compose(["+experiment=llama_lora"]).stages["sft"]
    one = bytes_of_one(1000, stage.optimizer)
    assert one == 12_000
    settings = stage.checkpoint.model_copy(
        update={"every_steps": 100, "keep_last": 2, "keep_best": True, "keep_every": None}
    )
    assert most_bytes(one, settings, steps=1000) == 4 * one, "two newest, the best, one being written"
    assert most_bytes(one, settings, steps=100) == 2 * one, "a single save"
    assert most_bytes(one, settings.model_copy(update={"keep_every": 250}), steps=1000) == 6 * one, "500 and 1000 too"
    assert bytes_of_one(1000, stage.optimizer.model_copy(update={"name": "adamw_8bit"})) == 6_031
