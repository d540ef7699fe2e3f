"""Freezes a run's configuration in its folder and refuses any other configuration there. Must not import torch."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from orchestrator.config.base import JsonValue, flatten
from orchestrator.errors import OrchestratorError, RunFolderError
from orchestrator.files.atomic import ELSEWHERE, existing_parent, os_sentence, read_json, write_json
from orchestrator.run_folder.folder import RunFolder
from orchestrator.run_state.frozen import read_config
from orchestrator.run_state.resume_rules import is_below


def freeze(folder: RunFolder, record: Mapping[str, Any], *, may_differ: frozenset[str]) -> None:
    """Write run.json, or check that the existing one is equal.

    Keys in `may_differ` (dotted, with everything below them) may change between attempts; every other difference
    raises RunFolderError with old and new value.
    """
    check_writable(folder.root)
    if not folder.run.exists():
        write_json(folder.run, record)
        return
    if refuse_differences(read_config(folder), record["config"], may_differ=may_differ, folder=folder.root):
        write_json(folder.run, record)


def refuse_differences(old: JsonValue, new: JsonValue, *, may_differ: frozenset[str], folder: Path) -> bool:
    """Whether anything differs; RunFolderError with every difference outside the keys in `may_differ`."""
    changed = differences(old, new)
    refused = {key: values for key, values in changed.items() if not is_below(key, may_differ)}
    if refused:
        raise RunFolderError(
            [
                f"{folder} holds a run with another configuration; set name= to start a new one, or repeat the old "
                f"values of {', '.join(refused)}",
                *(f"{key}: {_short(old)} in the folder, {_short(new)} now" for key, (old, new) in refused.items()),
            ]
        )
    return bool(changed)


def inherited(folder: RunFolder) -> dict[str, JsonValue]:
    """Fields of run.json besides the configuration that must be kept: the run that this one was forked from."""
    record: JsonValue = read_json(folder.run) if folder.run.exists() else {}
    return {"parent": record["parent"]} if isinstance(record, dict) and "parent" in record else {}


@contextmanager
def all_or_nothing(folder: Path) -> Generator[None]:
    """Context that writes into `folder`: if it fails, a folder that it created is removed."""
    missing = [path for path in [folder, *folder.parents] if not path.exists()]
    try:
        yield
    except (OSError, OrchestratorError):
        if folder in missing:
            shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # a parent that another run has started to use is not empty, and stays
            for parent in missing[1:]:
                parent.rmdir()
        raise


def check_writable(folder: Path, *, advice: str = ELSEWHERE) -> None:
    """Raise RunFolderError, with a remedy, if nothing can be written under `folder`; leaves nothing behind."""
    parent = existing_parent(folder)
    if not parent.is_dir():
        raise RunFolderError(f"{parent} is a file; output_dir must be a folder")
    probe = parent / f".write-test-{os.getpid()}"
    try:
        # A write, not os.access: quotas, read-only mounts and root squashing show only then.
        probe.write_bytes(b"0" * 4096)
    except OSError as error:
        raise RunFolderError(os_sentence(folder, error, advice=advice)) from None
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def refuse_inside_a_run(folder: Path) -> None:
    """Raise RunFolderError if a new run or study would be inside a run, with which it would be moved, copied and
    deleted.
    """
    if RunFolder(folder).is_run:
        return  # not new: its owner may still resume it
    around = run_around(folder)
    if around is not None:
        raise RunFolderError(f"{folder} would be inside the run {around}; set output_dir to a folder outside of it")


def run_around(path: Path) -> Path | None:
    """The run folder that contains a path, following links; another program's run.json does not count."""
    for parent in path.resolve().parents:
        with suppress(OSError, RunFolderError):
            if read_config(RunFolder(parent)):
                return parent
    return None


def differences(old: JsonValue, new: JsonValue) -> dict[str, tuple[JsonValue, JsonValue]]:
    """Old and new value of every leaf that differs, by dotted key."""
    before, after = flatten(old), flatten(new)
    keys = sorted(before.keys() | after.keys())
    parents = {key for key in keys if any(other.startswith(f"{key}.") for other in keys)}  # an empty map that got keys
    changed = [key for key in keys if key not in parents and before.get(key) != after.get(key)]
    return {key: (before.get(key), after.get(key)) for key in changed}


def _short(value: JsonValue) -> str:
    return json.dumps(value, ensure_ascii=False)[:60]
