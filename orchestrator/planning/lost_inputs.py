"""Inputs of an unfinished run (base and data) that are missing or have changed. Must not import torch."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from orchestrator.architecture.base_model import local_folder, looks_like_folder
from orchestrator.config.demonstration import DEMONSTRATIONS
from orchestrator.config.run import RunConfig
from orchestrator.data.sources.locate import HUB_ID
from orchestrator.errors import DataError, ModelError
from orchestrator.files.atomic import read_json
from orchestrator.files.cache import cache_folder
from orchestrator.planning.inspect_inputs import sources_of
from orchestrator.run_folder.checkpoints import saved_steps
from orchestrator.run_folder.folder import RunFolder
from orchestrator.run_state.content_digests import content_digests
from orchestrator.run_state.resume_rules import is_below, may_differ


def lost_inputs(config: RunConfig, run: RunFolder, unfinished: Sequence[str]) -> list[str]:
    """A sentence for each missing input; if none is missing, for each that changed under a saved checkpoint."""
    return _gone(config) or [problem for name in unfinished for problem in _changed(config, run, name)]


def _gone(config: RunConfig) -> list[str]:
    """Inputs of every stage, including finished ones, whose rows the plan of the rest counts."""
    trained = next((name for name in config.pipeline if config.stages[name].trains), None)
    base = Path(config.model.base)
    problems: dict[str, None] = {}
    # A preset's own base and a hub id are downloaded again if they are missing.
    if base.is_absolute() and looks_like_folder(config.model.base) and not base.is_dir():
        problems[_sentence("model.base", config.model.base, trained)] = None
    for name in config.pipeline:
        stage = config.stages[name]
        accepting = name if stage.trains else None
        paths = {f"{key}.path": source.path for key, source in sources_of(name, stage).items()}
        if stage.data.chat_template is not None:
            paths[f"stages.{name}.data.chat_template"] = stage.data.chat_template
        for key, path in paths.items():
            if not _is_there(path):
                # An override cannot name an element of a list.
                problems[_sentence(key, path, None if ".mix." in key else accepting)] = None
    return list(problems)


def _is_there(path: str) -> bool:
    if path in DEMONSTRATIONS or HUB_ID.match(path):
        return True  # nothing that a user could restore
    file = Path(path).expanduser()
    return file.exists() or (glob.has_magic(path) and bool(glob.glob(str(file), recursive=True)))  # noqa: PTH207


def _sentence(key: str, path: str, accepting: str | None) -> str:
    """`accepting` is a stage whose checkpoints can be made to accept the new path."""
    advice = "or start another run with name="
    if accepting is not None:
        advice = f"or type the `run` command with {key}=NEW_PATH stages.{accepting}.checkpoint.accept_changes=[{key}]"
    return f"{key}={path}, as run.json records it, is gone: put it back, {advice}"


def _changed(config: RunConfig, run: RunFolder, name: str) -> Iterator[str]:
    """Without a checkpoint nothing was learnt from the old content, and the stage starts with the new one."""
    files = run.stage(name)
    if not files.prepared.exists() or not saved_steps(files):
        return
    note = read_json(files.prepared)
    then: Mapping[str, str] = note.get("content", {})
    now = _content(config, name)
    accepted = may_differ(config)
    for key, subject, path in _subjects(config, name):
        if subject in then and subject in now and then[subject] != now[subject] and not is_below(key, accepted):
            yield (
                f"{path} changed since attempt {note.get('attempt')} of {name} trained on it: put the old content back, or "
                "start another run with name="
            )


def _content(config: RunConfig, name: str) -> Mapping[str, str]:
    """Empty if something cannot be read here: the ranks check again on their machine."""
    try:
        base_folder = local_folder(config.model, cache_folder(config.cluster.scratch))
        return {} if base_folder is None else content_digests(config, name, base_folder=base_folder)
    except (DataError, ModelError):
        return {}


def _subjects(config: RunConfig, name: str) -> list[tuple[str, str, str]]:
    """(key that accept_changes may name, name of the digest, displayed key and path)."""
    sources = sources_of(name, config.stages[name])
    data = ", or ".join(f"{key}.path={source.path}" for key, source in sources.items())
    base = f"model.base={config.model.base}"
    return [
        ("model.base", "base", f"{base} (weights or config.json)"),
        ("model.base", "tokenizer", f"{base} (tokenizer)"),
        (f"stages.{name}.data", "data", data),
    ]
