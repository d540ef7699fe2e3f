"""Overrides of the command line: parsing by Hydra's grammar, and problems of single overrides.

Must not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from orchestrator.composition.literals import (
    literal_parts,
    may_be_literal,
    names_existing_file,
    quoted,
    takes_text_only,
)
from orchestrator.config.key_hints import choice_hint, key_hint
from orchestrator.errors import ConfigError, nearest

PACKAGE = Path(__file__).resolve().parents[1]
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())
"""The wheel ships conf/ inside the package, where no other project's conf/ can overwrite it; a checkout has it at its
root."""
TOP_GROUPS = ("model", "tuning", "quantization", "sharding", "cluster", "launcher", "tracking", "study")
RECIPE = "demonstration"
"""Section of a stage in an experiment file: values for the rows that ship with this tool. Hints never suggest it."""
OPEN_MAPS = ("environment", "columns", "sets")
"""Maps whose keys the user chooses."""


@dataclass(frozen=True, kw_only=True)
class Override:
    """One override of the command line, as Hydra's grammar reads it."""

    text: str
    key: str
    value: object
    adds: bool
    deletes: bool

    @property
    def group(self) -> str:
        """The part of the key before a package: `optimizer@stages.sft.optimizer` -> `optimizer`."""
        return self.key.split("@")[0]


def parse_override(text: str) -> Override:
    """Parse one override; ConfigError if it is none, or an invalid one.

    A value that Hydra's grammar refuses (`~/rows.jsonl`, `a=b`, `run (1)`) is taken literally, unless it could be a
    faulty list, map or quoted text.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parts = literal_parts(text)
    try:
        parsed = OverridesParser.create().parse_override(text)
    except HydraException as error:
        if parts is None or not may_be_literal(parts[2]):
            raise ConfigError(_unreadable(text, reason=str(error).splitlines()[0])) from None
        return _literal(text)
    if parsed.is_sweep_override():
        if parts is not None and takes_text_only(parts[1]) and names_existing_file(parts[2]):
            return _literal(text)
        raise ConfigError(_several_values(text))
    if parsed.key_or_group.split(".")[0].split("/")[0] == "hydra":
        raise ConfigError(f"{text!r} sets Hydra itself, which writes nothing here; the run folder is output_dir/name")
    key = parsed.key_or_group + (f"@{parsed.package}" if parsed.package else "")
    value = None if parsed.is_delete() else parsed.value()
    if isinstance(value, bool | int | float) and parts is not None and takes_text_only(key):
        return _literal(text)  # name=2024: the digits, not the number
    adds = parsed.is_add() or parsed.is_force_add()
    return Override(text=text, key=key, value=value, adds=adds, deletes=parsed.is_delete())


def _literal(text: str) -> Override:
    parts = literal_parts(text)
    assert parts is not None
    mark, key, value = parts
    return Override(text=text, key=key, value=value, adds=bool(mark), deletes=False)


def _unreadable(text: str, *, reason: str) -> str:
    parts = literal_parts(text)
    if parts is None:
        return f"{text!r} is not an override ({reason}); type key=value or group=choice, quoted for the shell"
    return f"{text!r} cannot be read ({reason}); type key=[a,b] for a list, and for text {quoted(parts[1], parts[2])}"


def _several_values(text: str) -> str:
    parts = literal_parts(text)
    if parts is not None and parts[1] == "experiment":
        first = parts[2].split(",")[0].strip()
        return f"{text}: a run has one experiment; type +experiment={first}, or put -m before it for a run of each"
    meant = (
        f"; if the comma is part of the text, type {quoted(parts[1], parts[2])}"
        if parts is not None and takes_text_only(parts[1])
        else ""
    )
    return f"{text!r} holds several values; give one, a list in brackets (key=[a,b]), or -m for a run each{meant}"


def chooses_group(override: Override, roots: Sequence[Path]) -> bool:
    """Whether an override chooses a file of a config group; otherwise it sets a value."""
    is_group = any((root / override.group).is_dir() for root in roots)
    return is_group and ("@" in override.key or not isinstance(override.value, dict))


def choices_of(group: str, roots: Sequence[Path]) -> list[str]:
    """Names of the files of a group."""
    return sorted({file.stem for root in roots for file in (root / group).glob("*.yaml") if file.is_file()})


def group_problems(override: Override, roots: Sequence[Path]) -> list[str]:
    """Problems of a group's choice."""
    group = override.group
    choices = choices_of(group, roots)
    if override.deletes:
        return [f"{override.text}: a group cannot be removed; choose one of {', '.join(choices)}"]
    if group == "experiment" and isinstance(override.value, list):
        names = override.text.partition("=")[2].strip("[] ")
        return [_several_values(f"+experiment={names}")]
    if override.value not in choices:
        theirs = choice_hint(group, str(override.value))
        if theirs is not None:
            return [f"{override.text.lstrip('+')}: there is no such {group}; type {theirs}"]
        guess = nearest(str(override.value), choices)
        hint = f"did you mean {guess}? There are" if guess else "there are"
        return [f"{override.text.lstrip('+')}: there is no such {group}; {hint}: {', '.join(choices)}"]
    if group == "experiment" and not override.adds:
        return [f"{override.text}: an experiment is added; type +{override.text}"]
    if "@" not in override.key and group not in TOP_GROUPS and group != "experiment":
        if group == "hardware":
            return [
                f"{override.text}: hardware belongs to the cluster; type hardware@cluster.hardware={override.value}"
            ]
        return [f"{override.text}: {group} belongs to a stage; type {group}@stages.sft.{group}={override.value}"]
    if override.adds and group in TOP_GROUPS and "@" not in override.key:
        return [f"{override.text}: {group} is chosen already; type {override.text.lstrip('+')}"]
    return []


def experiment_problems(overrides: Sequence[Override]) -> list[str]:
    """Problems of several experiments: a run has one."""
    chosen = [override.text for override in overrides if override.key == "experiment" and override.adds]
    return [f"{' '.join(chosen)}: a run has one experiment; leave out all but one"] if len(chosen) > 1 else []


def key_problems(override: Override, keys: Sequence[str]) -> list[str]:
    """Problems of a value override, which must match an existing key; added keys are validated later."""
    if override.adds:
        is_there = override.key in keys and not override.text.startswith("++")
        return [f"{override.text}: this key exists already; type {override.text.lstrip('+')}"] if is_there else []
    if override.key in keys or in_open_map(override.key):
        return []
    offered = [known for known in keys if RECIPE not in known.split(".")]
    return [f"{override.key}: unknown key{key_hint(override.key, offered)}"]


def in_open_map(key: str) -> bool:
    return any(part in OPEN_MAPS for part in key.split(".")[:-1])


def dotted_keys(tree: Any, prefix: str = "") -> list[str]:
    """Every dotted key of a tree, including inner nodes."""
    if not isinstance(tree, dict):
        return []
    keys: list[str] = []
    for name, value in cast("dict[str, Any]", tree).items():
        keys += [prefix + name, *dotted_keys(value, f"{prefix}{name}.")]
    return keys


def duplicated_keys(overrides: Sequence[str]) -> list[str]:
    """Keys that are given twice with different values, which is ambiguous."""
    problems: list[str] = []
    first: dict[str, str] = {}
    for text in overrides:
        key, equals, _ = text.lstrip("+").partition("=")
        if not equals or text.startswith("~") or key == "experiment":  # ~key key=1 is Hydra's way to replace
            continue
        before = first.setdefault(key, text)
        if before.lstrip("+") != text.lstrip("+"):
            problems.append(f"{key} is given twice, {before} and {text}: leave one out")
    return problems
