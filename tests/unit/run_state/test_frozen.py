"""run.json of another place and of other versions: the folder decides where files are, the version what can be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Asker

from orchestrator import __version__
from orchestrator.composition.compose import compose
from orchestrator.errors import RunFolderError
from orchestrator.files.atomic import read_json, write_json
from orchestrator.run_folder.folder import RunFolder, run_directory_of
from orchestrator.run_state.frozen import added_keys, load_config, load_frozen

LORA = "+experiment=llama_lora"


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    return compose([LORA, "seed=7", "name=first", "output_dir=/elsewhere"]).model_dump(mode="json")


def write(folder: Path, values: dict[str, Any], *, version: str = __version__) -> RunFolder:
    run = RunFolder(folder)
    write_json(run.run, {"orchestrator": version, "config": values})
    return run


@pytest.mark.parametrize("name", ["first", "renamed", "a copy (2) ü"])
def test_a_run_is_where_its_folder_is(tmp_path: Path, values: dict[str, Any], name: str) -> None:
    run = write(tmp_path / name, values)
    config = load_config(run)
    assert run_directory_of(config) == tmp_path / name
    (tmp_path / "link").symlink_to(run.root)
    assert run_directory_of(load_config(RunFolder(tmp_path / "link"))) == tmp_path / name


def test_keys_added_since_take_the_defaults_of_the_runs_own_choices(tmp_path: Path, values: dict[str, Any]) -> None:
    old = json.loads(json.dumps(values))
    del old["profile"], old["seeds"], old["tuning"]["dropout"], old["stages"]["sft"]["faults"]["spike_window"]
    frozen = load_frozen(write(tmp_path / "run", old, version="0.0.1"))
    assert frozen.config.seeds.weights == 7, "${seed} is the run's own seed"
    assert dict(frozen.filled) == {
        "profile": False,
        "seeds": {"weights": 7, "data": 7, "split": 7},
        "tuning.dropout": values["tuning"]["dropout"],
        "stages.sft.faults.spike_window": 50,
    }
    assert frozen.config.model_dump(mode="json") | {"name": "", "output_dir": ""} == values | {
        "name": "",
        "output_dir": "",
    }


def test_a_newer_version_is_named(tmp_path: Path, values: dict[str, Any]) -> None:
    newer = json.loads(json.dumps(values))
    newer["stages"]["sft"]["telepathy"] = 3
    run = write(tmp_path / "run", newer, version="99.0.0")
    with pytest.raises(RunFolderError) as error:
        load_config(run)
    (told,) = error.value.problems
    assert told == (
        f"{run.run} was written by version 99.0.0 of the orchestrator and cannot be read by this one, {__version__}; use version "
        "99.0.0 for this run"
    )
    with pytest.raises(RunFolderError, match="telepathy: unknown key"):
        load_config(write(tmp_path / "older", newer, version="0.0.1"))


def test_facts_of_a_model_are_never_guessed(tmp_path: Path, values: dict[str, Any]) -> None:
    old = json.loads(json.dumps(values))
    del old["model"]["preset"]["architecture"]["vocab_size"]
    with pytest.raises(RunFolderError, match=r"lacks model\.preset\.architecture\.vocab_size"):
        load_config(write(tmp_path / "run", old, version="0.0.1"))


def test_render_of_an_older_run_names_the_defaults_and_remembers_them(ask: Asker) -> None:
    assert ask("render", LORA).code == 0
    run = RunFolder(ask.folder / "runs" / "llama_lora")
    record = read_json(run.run)
    del record["config"]["profile"], record["config"]["stages"]["sft"]["faults"]["spike_window"]
    write_json(run.run, {**record, "orchestrator": "0.0.1"})
    again = ask("render", LORA)
    assert again.code == 0, again
    (warning,) = [line for line in again.errors if line.startswith("warning: run.json")]
    assert "written by version 0.0.1" in warning and "profile=false" in warning and "spike_window=50" in warning
    assert added_keys(run) == {"profile", "stages.sft.faults.spike_window"}
    assert ask("render", LORA).errors == () and len(added_keys(run)) == 2


def test_a_run_of_a_newer_version_is_only_read(ask: Asker) -> None:
    """Even where no key is unknown: one may mean something else by now."""
    assert ask("render", LORA).code == 0
    run = RunFolder(ask.folder / "runs" / "llama_lora")
    record = read_json(run.run)
    write_json(run.run, {**record, "orchestrator": "9.9.9"})
    for words in (["resume", str(run.root)], ["run", LORA], ["render", LORA], ["fork", str(run.root), "name=second"]):
        (told,) = ask.refused(*words)
        assert "run.json was written by version 9.9.9 of the orchestrator" in told and "use version 9.9.9" in told
    write_json(run.root.with_name("other") / "run.json", record)
    for words in (["generate", str(run.root)], ["export", str(run.root)], ["status", "runs"], ["compare", "runs"]):
        warning, *_ = ask(*words).errors
        assert warning.startswith("warning: ") and warning.endswith(
            f"version 9.9.9 of the orchestrator and is read by {__version__}"
        )
    assert "llama_lora: skipped, version 9.9.9 of the orchestrator wrote it" in ask("prune", "--dry-run").out
    write_json(run.run, {**record, "orchestrator": f"{__version__}.0+local"})
    assert ask("render", LORA).code == 0, "zeros and labels make no newer version"
    write_json(run.run, {**record, "orchestrator": [1]})
    (told,) = ask.refused("resume", str(run.root))
    assert "run.json is damaged: orchestrator is [1], not a version" in told


@pytest.mark.parametrize("verb", ["resume", "status", "logs", "cancel", "generate", "export", "audit"])
def test_a_folder_without_run_json_is_refused_by_every_verb(ask: Asker, verb: str) -> None:
    (ask.folder / "empty").mkdir()
    (told,) = ask.refused(verb, "empty")
    assert "run.json" in told and "empty" in told
