"""`fork`: what a new run takes from another one, what it may change, and that the parent is only read."""

from __future__ import annotations

import pytest
from command_line import Asker, files_of, write_model, write_rows
from run_folders import finish, write_checkpoint, write_run, write_training

from orchestrator.config.rules import parse_types
from orchestrator.files.atomic import read_json, write_json
from orchestrator.run_folder.folder import RunFolder
from orchestrator.run_state.frozen import read_config
from orchestrator.run_state.resume_rules import settings_that_matter

LORA = "+experiment=llama_lora"
ROWS = [{"instruction": f"Say {number}", "input": "", "output": str(number)} for number in range(20)]


def parent(ask: Asker, *words: str, is_done: bool = False) -> RunFolder:
    if not (ask.folder / "model").exists():
        write_model(ask.folder / "model")
        write_rows(ask.folder / "rows.jsonl", ROWS)
    base = (
        f"model.base={ask.folder / 'model'}",
        "model.dtype=float32",
        "stages.sft.max_steps=6",
        "stages.sft.optimizer.lr=2e-3",
    )
    data = (f"stages.sft.data.train.path={ask.folder / 'rows.jsonl'}", "stages.sft.start_from=null")
    run = write_run(ask.folder / "runs", "a", *base, *data, *words)
    write_training(run.stage("sft"), [2.0, 1.9, 1.8, 1.7], evaluations={0: 2.0})
    settings = settings_that_matter(parse_types(read_config(run)), "sft") | {"stages.sft.data": "rows1"}
    for step in (2, 4):
        write_checkpoint(run.stage("sft"), step, settings=settings)
    if is_done:
        finish(run.stage("sft"), base={"name": str(ask.folder / "model"), "folder": str(ask.folder / "model")}, steps=4)
    return run


def sft(run: RunFolder) -> dict[str, object]:
    config = read_json(run.run)["config"]
    return config["stages"]["sft"]


def test_a_checkpoint_goes_on_with_the_changes_accepted(ask: Asker) -> None:
    run = parent(ask)
    before = files_of(run.root)
    told = ask("fork", "runs/a", "name=b", "stages.sft.optimizer.lr=1e-5", "--no-start")
    assert told.code == 0, told
    assert "from its checkpoint of step 4: weights, optimizer state" in told.out
    assert "stages.sft.optimizer.lr: 0.002 -> 1e-05" in told.out and "start it with: orchestrator resume" in told.out
    fork = RunFolder(ask.folder / "runs" / "b")
    assert files_of(run.root) == before, "the parent is only read"
    assert [path.name for path in fork.stage("sft").checkpoints.iterdir()] == ["step-00000004"]
    checkpoint = sft(fork)["checkpoint"]
    assert checkpoint["accept_changes"] == ["stages.sft.optimizer.lr"] and checkpoint["probe_rows"] > 0  # type: ignore[index]
    origin = read_json(fork.run)["parent"]
    manifest = read_json(run.stage("sft").checkpoint(4) / "MANIFEST.json")["manifest_sha256"]
    assert (origin["name"], origin["from"], origin["step"], origin["manifest_sha256"]) == (
        "a",
        "checkpoint",
        4,
        manifest,
    )


def test_other_rows_are_accepted_and_the_probe_is_left_out(ask: Asker) -> None:
    parent(ask)
    write_rows(ask.folder / "more.jsonl", ROWS)
    told = ask(
        "fork", "runs/a", "name=b", "stages.sft.data.train.path=more.jsonl", "seed=7", "--step", "2", "--no-start"
    )
    assert told.code == 0 and "probe_rows=0: the stored loss belongs to the old settings" in told.out, told
    fork = RunFolder(ask.folder / "runs" / "b")
    assert "stages.sft.data" in sft(fork)["checkpoint"]["accept_changes"]  # type: ignore[index]
    assert read_json(fork.run)["config"]["seeds"] == {"weights": 7, "data": 7, "split": 7}
    assert sft(fork)["data"]["train"]["path"] == str(ask.folder / "more.jsonl")  # type: ignore[index]


def test_a_moved_finished_run_is_trained_on_from_its_artifact(ask: Asker) -> None:
    run = parent(ask, is_done=True)
    moved = RunFolder(run.root.rename(ask.folder / "moved"))
    before = files_of(moved.root)
    told = ask("fork", "moved", "name=b", "stages.sft.optimizer.lr=1e-5", "tracking=none", "--no-start")
    assert told.code == 0 and "from its proven artifact: training begins at step 0 with a new optimizer" in told.out, (
        told
    )
    fork = RunFolder(ask.folder / "b")
    assert sft(fork)["start_from"] == "parent" and files_of(moved.root) == before
    copied = fork.stage("parent")
    assert read_json(copied.result)["artifact"]["path"] == str(copied.artifact)
    assert files_of(copied.artifact) == files_of(moved.stage("sft").artifact)
    assert ask("status", "b").out.splitlines()[1].split()[:4] == ["b", "sft", "not", "started"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("stages.sft.optimizer.lr=1",), "the new run needs a name of its own"),
        (("name=b", "name=c"), "name is given twice, name=b and name=c: leave one out"),
        (("name=b", "stages.sft.optimizer.lrr=1"), "stages.sft.optimizer.lrr: unknown key; did you mean"),
        (("name=b", "tuning.rank=4"), "tuning.rank: 16 in a cannot become 4 in a fork from its checkpoint"),
        (("name=b", "model.dtype=bfloat16"), 'model.dtype: "float32" in a cannot become "bfloat16"'),
        (("name=b", "stages.sft.max_steps=3"), "the checkpoint is of step 4, and training ends at step 3: set"),
        (("name=b", "--step", "3"), "--step 3: the checkpoints in"),
        (("name=b", "--from", "artifact"), "is not there, or not what"),
        (("name=b", "--from", "artifact", "--step", "2"), "--step belongs to a checkpoint"),
        (("name=b", "--stage", "dpo"), "--stage dpo: the stages that train are sft"),
        (("name=b", "cluster=h100x8"), "this file includes others"),
    ],
)
def test_what_a_fork_cannot_be_is_refused(words: tuple[str, ...], sentence: str, ask: Asker) -> None:
    parent(ask)
    assert any(sentence in told for told in ask.refused("fork", "runs/a", *words)), words


def test_no_run_is_written_inside_another_one(ask: Asker) -> None:
    run = parent(ask)
    (ask.folder / "link").symlink_to(run.stage("sft").root)
    write_json(ask.folder / "run.json", {"of": "another program"})  # bars nothing: the folder around it is no run
    why = f"would be inside the run {run.root}; "
    verbs = [("fork", "runs/a", "name=ff", "--dry-run", f"output_dir={where}") for where in ("runs/a", "link")]
    verbs += [(verb, LORA, "name=ff", "output_dir=runs/a/sft") for verb in ("render", "run")]
    for words in verbs:
        (sentence,) = ask.refused(*words)
        assert sentence.endswith(f"/ff {why}set output_dir to a folder outside of it"), (words, sentence)
    assert ask.refused("init", "runs/a/mine.yaml") == (f"runs/a/mine.yaml {why}choose a path outside it",)
    assert ask("render", LORA, "output_dir=runs").code == 0


def test_a_damaged_checkpoint_and_a_taken_name_are_refused(ask: Asker) -> None:
    run = parent(ask)
    write_run(ask.folder / "runs", "b")
    assert "b exists already; choose another name=" in ask.refused("fork", "runs/a", "name=b", "--no-start")[0]
    for step in (2, 4):
        (run.stage("sft").checkpoint(step) / "state.json").write_text("{}")
    told = ask.refused("fork", "runs/a", "name=c", "--no-start")
    assert "holds no proven checkpoint" in told[0] and "state.json" in told[1]


def test_a_run_that_never_began_has_nothing_to_fork(ask: Asker) -> None:
    write_model(ask.folder / "model")
    write_rows(ask.folder / "rows.jsonl", ROWS)
    assert ask("fork", "runs", "name=b").errors[0].startswith("runs is not a run folder")
    write_json(ask.folder / "empty" / "run.json", {"config": read_config(write_run(ask.folder / "runs", "a"))})
    assert "has neither a checkpoint nor an artifact yet" in ask.refused("fork", "empty", "name=b")[0]
