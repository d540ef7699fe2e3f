"""`rm` and `prune`: what they delete, and above all what they leave."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from command_line import Asker, files_of
from run_folders import finish, stop, write_checkpoint, write_run, write_training

from orchestrator.files.atomic import write_json
from orchestrator.files.cache import cache_folder
from orchestrator.run_folder.folder import RunFolder


def trained(root: Path, name: str, *, steps: tuple[int, ...] = (2, 4), is_done: bool = True) -> RunFolder:
    run = write_run(root, name)
    files = run.stage("sft")
    write_training(files, [2.0, 1.0], evaluations={0: 2.0})
    for step in steps:
        write_checkpoint(files, step)
    if is_done:
        finish(files)
    else:
        stop(files)
    return run


def answer(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _question: text)


def test_rm_asks_and_deletes_the_run_alone(ask: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    run, other = trained(ask.folder / "runs", "a"), trained(ask.folder / "runs", "b")
    kept = files_of(other.root)
    (sentence,) = ask.refused("rm", "runs/a")
    assert sentence.startswith("delete 1 run, ") and sentence.endswith("add --yes to confirm")
    answer(monkeypatch, "n")
    assert ask.refused("rm", "runs/a") == ("nothing was deleted",)
    answer(monkeypatch, "y")
    assert ask("rm", "runs/a").code == 0 and not run.root.exists() and files_of(other.root) == kept
    assert [path.name for path in (ask.folder / "runs").iterdir()] == ["b"]


def test_rm_refuses_what_is_no_run_of_ours(ask: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(ask.folder / "runs", "a")
    (ask.folder / "link").symlink_to(run.root)
    (ask.folder / "foreign").mkdir()
    told = ask.refused("rm", "link", "runs", "foreign", "nowhere", "--yes")
    assert [sentence.split(" is ")[1].split(";")[0].split(":")[0] for sentence in told] == [
        "a link", "a folder of 1 run", "not a run folder", "not a folder",
    ]  # fmt: skip
    (run.root / "thesis.tex").write_text("years of work")
    assert "also holds thesis.tex, which no run wrote" in ask.refused("rm", "runs/a", "--yes")[0]
    (run.root / "thesis.tex").unlink()
    (run.root / "run.json").write_text("{")
    assert "is damaged" in ask.refused("rm", "runs/a", "--yes")[0]


def test_rm_never_follows_a_link_and_never_takes_a_running_run(ask: Asker) -> None:
    outside = ask.folder / "outside"
    outside.mkdir()
    (outside / "precious").write_text("mine")
    run = trained(ask.folder, "a")
    (run.stage("sft").artifact / "link").symlink_to(outside)
    live = write_run(ask.folder, "live")
    write_training(live.stage("sft"), [2.0], evaluations={0: 2.0})
    (sentence,) = ask.refused("rm", "a", "live", "--yes")
    assert "live: stage sft is running; end it first with `orchestrator cancel" in sentence
    assert ask("rm", "a", "--yes").code == 0 and not run.root.exists() and (outside / "precious").read_text() == "mine"


def test_rm_refuses_another_run_and_foreign_files_inside_a_stage(ask: Asker) -> None:
    outer, inner = trained(ask.folder, "outer"), trained(ask.folder, "a")
    (outer.stage("sft").root / "notes.txt").write_text("years of work")
    assert "outer/sft also holds notes.txt, which no run wrote" in ask.refused("rm", "outer", "--yes")[0]
    (outer.stage("sft").root / "notes.txt").unlink()
    for nested in (outer.stage("sft").root / "inner", outer.stage("sft").artifact / "deep" / "er"):
        shutil.copytree(inner.root, nested)
        (sentence,) = ask.refused("rm", "outer", "--yes")
        assert sentence.endswith(f"outer also holds the run {nested}; move that away first")
        shutil.rmtree(nested)
    assert ask("rm", "outer", "--yes").code == 0 and inner.run.exists()


def test_a_study_goes_and_its_trials_stay(ask: Asker) -> None:
    trained(ask.folder, "hunt-trial_1")
    write_json(ask.folder / "hunt-study" / "study.json", {})
    assert ask("rm", "hunt-study", "--yes").code == 0
    assert [path.name for path in ask.folder.iterdir()] == ["hunt-trial_1"]


def test_prune_keeps_what_is_needed(ask: Asker) -> None:
    done = trained(ask.folder / "runs", "done")
    going = trained(ask.folder / "runs", "going", steps=(2, 4, 6, 8, 10), is_done=False)
    damaged = trained(ask.folder / "runs", "damaged", steps=(2, 4, 6, 8), is_done=False)
    for step in (4, 6, 8):  # all but the oldest fail their proof: it is the one to go on from
        (damaged.stage("sft").checkpoint(step) / "rank-00000.safetensors").write_bytes(b"torn")
    lost = trained(ask.folder / "runs", "lost")
    (lost.stage("sft").artifact / "MANIFEST.json").unlink()
    live = write_run(ask.folder / "runs", "live")
    write_training(live.stage("sft"), [2.0], evaluations={0: 2.0})
    (live.stage("sft").quarantine / "step-00000002.1").mkdir(parents=True)
    (done.superseded / "sft-1" / "artifact").mkdir(parents=True)
    (going.superseded / "sft-1" / "artifact").mkdir(parents=True)
    (going.stage("sft").quarantine / "step-00000003.1").mkdir(parents=True)
    listed = ask("prune", "--dry-run")
    assert (
        listed.code == 0 and "nothing was deleted" in listed.out and "live: skipped, stage sft is running" in listed.out
    )
    assert ask.refused("prune")[-1].startswith("delete these ")
    before = files_of(ask.folder / "runs")
    assert ask("prune", "--yes").code == 0
    gone = {
        name
        for name in before.keys() - files_of(ask.folder / "runs").keys()
        if name.count("/") < 4 and "." not in name[-6:]
    }
    assert gone == {
        "done/sft/checkpoints/step-00000002", "done/sft/checkpoints/step-00000004", "done/superseded/sft-1",
        "going/sft/checkpoints/step-00000002", "going/sft/checkpoints/step-00000004", "going/sft/checkpoints/step-00000006",
        "done/superseded/sft-1/artifact",
    }  # fmt: skip
    assert not any((going.stage("sft").quarantine).iterdir()) and going.stage("sft").checkpoint(10).is_dir()
    assert ask("prune", "--yes").out.endswith("nothing to prune\n")


def test_keep_every_and_links_are_obeyed(ask: Asker) -> None:
    run = write_run(ask.folder, "a", "stages.sft.checkpoint.keep_every=4")
    for step in (2, 4, 6, 8):
        write_checkpoint(run.stage("sft"), step)
    finish(run.stage("sft"))
    linked = write_run(ask.folder, "linked")
    elsewhere = ask.folder / "disk"
    write_checkpoint(linked.stage("sft"), 2).parent.rename(elsewhere)
    linked.stage("sft").checkpoints.symlink_to(elsewhere)
    finish(linked.stage("sft"))
    assert ask("prune", "a", "linked", "--yes").code == 0
    assert sorted(path.name for path in run.stage("sft").checkpoints.iterdir()) == ["step-00000004", "step-00000008"]
    assert (elsewhere / "step-00000002").is_dir(), "a link out of the run is never followed"


def test_prune_skips_a_linked_run_and_names_its_folder(ask: Asker) -> None:
    real = trained(ask.folder / "other", "real")
    trained(ask.folder / "runs", "a")
    (ask.folder / "runs" / "link").symlink_to(real.root)
    before = files_of(ask.folder / "other")
    told = ask("prune", "runs", "--yes")
    assert told.code == 0 and "deleted 2 entries" in told.out, told
    assert f"link: skipped, a link to {real.root}; give that folder" in told.out
    assert files_of(ask.folder / "other") == before


def test_the_cache_loses_what_no_run_refers_to(ask: Asker) -> None:
    data, run = cache_folder() / "data", trained(ask.folder / "runs", "a", steps=())
    old = time.time() - 7200
    for name in ("used", "unused", "fresh"):
        (data / name / "evaluation").mkdir(parents=True)
        (data / name / "meta.json").write_text("{}")
        os.utime(data / name, None if name == "fresh" else (old, old))
    (data / "no_set").mkdir()
    os.utime(data / "no_set", (old, old))
    write_json(
        run.stage("sft").prepared, {"train": str(data / "used"), "evaluation": str(data / "used" / "evaluation")}
    )
    assert "nothing to prune" in ask("prune", "runs/a", "--yes").out, "one run does not know who else uses the cache"
    assert ask("prune", "--yes").code == 0
    assert sorted(path.name for path in data.iterdir()) == ["fresh", "no_set", "used"]
    assert ask.refused("prune", "nowhere")[0].startswith("nowhere is not a run folder, and holds none")
