"""Base and data of an unfinished run that are gone or changed: `resume` names the key, the path and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import ROW, Asker, write_model, write_rows
from run_folders import write_checkpoint

from orchestrator.files.atomic import write_json
from orchestrator.planning.lost_inputs import lost_inputs
from orchestrator.run_folder.folder import RunFolder
from orchestrator.run_state.content_digests import content_digests
from orchestrator.run_state.frozen import load_config

ACCEPT = "stages.sft.checkpoint.accept_changes="


@pytest.fixture
def words(ask: Asker) -> list[str]:
    write_model(ask.folder / "base")
    write_rows(ask.folder / "rows.jsonl", [ROW] * 40)
    words = ["+experiment=llama_lora", "name=run", "launcher=local", "tracking=none", "model.dtype=float32"]
    words += ["model.base=base", "stages.sft.data.train.path=rows.jsonl"]
    assert ask("render", *words).code == 0
    return words


@pytest.mark.parametrize(("lost", "key"), [("rows.jsonl", "stages.sft.data.train.path"), ("base", "model.base")])
def test_what_is_gone_is_named_and_the_advice_holds(ask: Asker, words: list[str], lost: str, key: str) -> None:
    path = ask.folder / lost
    moved = path.rename(path.with_name(f"moved-{lost}"))
    (told,) = ask.refused("resume", "runs/run")
    assert told == (
        f"{key}={path}, as run.json records it, is gone: put it back, or type the `run` command with {key}=NEW_PATH "
        f"{ACCEPT}[{key}]"
    )
    kept = [word for word in words if not word.startswith(key)]
    assert ask("render", *kept, f"{key}={moved}", f"{ACCEPT}[{key}]").code == 0
    assert (
        lost_inputs(load_config(RunFolder(ask.folder / "runs/run")), RunFolder(ask.folder / "runs/run"), ["sft"]) == []
    )


def change_rows(folder: Path) -> str:
    write_rows(folder / "rows.jsonl", [{**ROW, "output": "blue"}] * 40)
    return f"stages.sft.data.train.path={folder / 'rows.jsonl'}"


def change_base(folder: Path) -> str:
    file = folder / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    return f"model.base={folder / 'base'} (weights or config.json)"


@pytest.mark.parametrize("change", [change_rows, change_base])
def test_what_changed_under_a_checkpoint_is_named(ask: Asker, words: list[str], change: Callable[[Path], str]) -> None:
    run = RunFolder(ask.folder / "runs" / "run")
    files, config = run.stage("sft"), load_config(run)
    content = content_digests(config, "sft", base_folder=ask.folder / "base")
    write_json(files.prepared, {"attempt": 1, "content": content})
    subject = change(ask.folder)
    assert lost_inputs(config, run, ["sft"]) == [], "nothing was saved, so nothing was learnt from the old content"
    write_checkpoint(files, 20)
    assert ask.refused("resume", "runs/run") == (
        f"{subject} changed since attempt 1 of sft trained on it: put the old content back, or start another run with name=",
    )
    assert lost_inputs(config, run, []) == []
