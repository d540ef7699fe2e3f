"""Reads the frozen configuration of a run folder, for the folder's current path. Must not import torch.

`name` and `output_dir` in run.json record where the run was started. They never decide where its files are: a run may
be moved, renamed, copied or mounted elsewhere, so the given folder replaces them here, and only here.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from pydantic import ValidationError

from orchestrator import __version__
from orchestrator.config.base import JsonValue
from orchestrator.config.run import RunConfig
from orchestrator.config.validation_messages import missing_paths, problem_sentences
from orchestrator.errors import ConfigError, RunFolderError
from orchestrator.files.atomic import read_json
from orchestrator.run_folder.folder import RunFolder

JsonObject = dict[str, JsonValue]

CHOICES = {
    "tuning": "method",
    "quantization": "scheme",
    "sharding": "strategy",
    "launcher": "kind",
    "tracking": "kind",
    "study": "kind",
}
"""Group -> the key that names the group's file."""
NO_DEFAULT = "model.preset"
"""Facts of one model; those of the default preset would belong to another model."""
NESTED = 8
"""Rounds of filling in defaults: a section that was missing may itself lack keys."""
STAND_IN = "run"
"""Name for validation only, if the folder's own name (blanks, umlauts) is not valid for `name=`."""


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A run.json as this version of the tool understands it."""

    config: RunConfig
    values: JsonObject
    """The same as plain values, as they would be written today."""
    version: str
    """Of the tool that wrote it."""
    filled: Mapping[str, JsonValue]
    """Keys that this version has and run.json lacks, with the defaults that apply."""
    added: Mapping[str, JsonValue]
    """These keys and all filled in before: earlier results of the run were made without them."""


def load_config(run: RunFolder) -> RunConfig:
    """The configuration of a run folder at its current path. RunFolderError if this version cannot read it."""
    return load_frozen(run).config


def load_frozen(run: RunFolder) -> Frozen:
    """The configuration of a run folder, with the keys that had to be added."""
    record = _record(run)
    values, version = read_config(run), _version(run, record)
    folder = run.root.resolve()
    is_name = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", folder.name) is not None
    values = {**values, "name": folder.name if is_name else STAND_IN, "output_dir": str(folder.parent)}
    earlier = record.get("added")
    added: JsonObject = dict(earlier) if isinstance(earlier, dict) else {}
    config, values, filled = _validated(run, values, version)
    return Frozen(
        config=config.model_copy(update={"name": folder.name}),
        values={**values, "name": folder.name},
        version=version,
        filled=filled,
        added={**added, **filled},
    )


def newer_version(run: RunFolder) -> str | None:
    """The version that wrote run.json if it is newer than this one; else None."""
    version = _version(run, _record(run))
    return version if _numbers(version) > _numbers(__version__) else None


def refuse_newer(run: RunFolder) -> None:
    """Raise RunFolderError if a newer version wrote the run: equal keys may have a different meaning there."""
    version = newer_version(run)
    if version is not None:
        raise RunFolderError(
            f"{run.run} was written by version {version} of the orchestrator, and this one is {__version__}; use version "
            f"{version} or a later one for this run"
        )


def warn_newer(run: RunFolder) -> None:
    """Warn, in a verb that only reads a run, that its output may be wrong; nothing is lost."""
    version = newer_version(run)
    if version is not None:
        print(
            f"warning: {run.run} was written by version {version} of the orchestrator and is read by {__version__}",
            file=sys.stderr,
        )


def read_config(folder: RunFolder) -> JsonObject:
    """The configuration in run.json as plain values; RunFolderError if run.json is not ours."""
    config = _record(folder).get("config")
    if not isinstance(config, dict):
        raise RunFolderError(f"{folder.run} is damaged: it holds no config")
    return config


def added_keys(run: RunFolder) -> frozenset[str]:
    """Keys that were added to the configuration after the run began; earlier results were made without them."""
    added = _record(run).get("added")
    return frozenset(added) if isinstance(added, dict) else frozenset()


def filled_sentence(frozen: Frozen) -> str:
    """Which defaults apply to a run of an older version."""
    shown = ", ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in frozen.filled.items())
    return f"run.json was written by version {frozen.version} and lacks keys of version {__version__}; defaults apply: {shown}"


def _record(run: RunFolder) -> JsonObject:
    record: JsonValue = read_json(run.run)
    return record if isinstance(record, dict) else {}


def _version(run: RunFolder, record: JsonObject) -> str:
    """Of the tool that wrote run.json."""
    version = record.get("orchestrator", "unknown")  # the first runs did not record it
    if not isinstance(version, str):
        raise RunFolderError(
            f"{run.run} is damaged: orchestrator is {json.dumps(version)}, not a version such as 0.1.0"
        )
    return version


def _numbers(version: str) -> tuple[int, ...]:
    """`0.2.0` as (0, 2): suffixes (.dev1, +local) and trailing zeros are ignored."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [] if found is None else [int(number) for number in found[0].split(".")]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def _validated(run: RunFolder, values: JsonObject, version: str) -> tuple[RunConfig, JsonObject, JsonObject]:
    """(configuration, plain values, what was filled in)."""
    filled: JsonObject = {}
    defaults: Any = None
    for _ in range(NESTED):
        try:
            return RunConfig.model_validate_json(json.dumps(values), strict=True), values, filled
        except ValidationError as error:
            missing = missing_paths(error, values)
            if not missing or len(missing) < len(error.errors()):
                raise _unreadable(run, version, problem_sentences(error, values, RunConfig)) from None
            defaults = _defaults(values) if defaults is None else defaults
            for path in missing:
                values = _with(values, path, _default(run, version, defaults, path))
                filled[".".join(path)] = _at(values, path)
    raise AssertionError("a section of the configuration is nested more deeply than keys are filled in")


def _unreadable(run: RunFolder, version: str, problems: list[str]) -> RunFolderError:
    """Problems of keys or values that this version lacks: usually a newer one wrote them."""
    if version == __version__:
        return RunFolderError([f"{run.run} does not hold a configuration of version {version}", *problems])
    return RunFolderError(
        [
            f"{run.run} was written by version {version} of the orchestrator and cannot be read by this one, {__version__}; "
            f"use version {version} for this run",
            *([] if _numbers(version) > _numbers(__version__) else problems),  # its new keys are not separate faults
        ]
    )


def _default(run: RunFolder, version: str, defaults: Any, path: list[str]) -> JsonValue:
    dotted = ".".join(path)
    try:
        if dotted.startswith(NO_DEFAULT):
            raise KeyError(dotted)
        return _at(defaults, path)
    except (KeyError, TypeError):
        raise RunFolderError(
            f"{run.run} was written by version {version}, lacks {dotted}, and {dotted} has no default; use that version, "
            "or start a new run with name="
        ) from None


def _defaults(values: JsonObject) -> JsonObject:
    """conf/ composed with the run's choices and overlaid with its own values, so that `${seed}` is its seed."""
    from omegaconf import OmegaConf

    from orchestrator.composition.hydra_tree import as_sentences, compose_tree
    from orchestrator.composition.overrides import CONF

    words = [
        f"{group}={chosen}"
        for group, key in CHOICES.items()
        if isinstance(section := values.get(group), dict) and isinstance(chosen := section.get(key), str)
    ]
    stages = values.get("stages")
    kinds = {
        name: kind
        for name, stage in (stages.items() if isinstance(stages, dict) else ())
        if isinstance(stage, dict) and isinstance(kind := stage.get("kind"), str)
    }
    try:
        with as_sentences([CONF]):
            tree = compose_tree([*words, *(f"+stage@stages.{name}={kind}" for name, kind in kinds.items())], [CONF])
    except ConfigError:  # a choice that this version lacks: reported when the values are validated
        return {}
    merged = OmegaConf.merge(tree, OmegaConf.create(cast("Any", values)))
    return cast("JsonObject", OmegaConf.to_container(merged, resolve=True))


def _at(tree: Any, path: list[str]) -> Any:
    """The value at a path; KeyError or TypeError if it is missing, or the path crosses a list."""
    for key in path:
        tree = tree[key]
    return tree


def _with(tree: JsonObject, path: list[str], value: JsonValue) -> JsonObject:
    """The tree with one more leaf, as a copy."""
    key, *rest = path
    below = tree.get(key)  # never a list: list items have no default
    return {**tree, key: _with(below if isinstance(below, dict) else {}, rest, value) if rest else value}
