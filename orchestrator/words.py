"""Overrides of the command line: what Hydra's grammar reads, and what is wrong with a word. Must not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from orchestrator.errors import ConfigError, nearest

PACKAGE = Path(__file__).resolve().parent
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())
"""The wheel carries conf/ inside the package, where no other project's conf/ can replace it; a checkout has it at its top."""
TOP_GROUPS = ("model", "tuning", "quantization", "sharding", "cluster", "launcher", "tracking", "study")
RECIPE = "demonstration"
"""Section of a stage in an experiment file: values for the rows that ship with this tool. No hint leads into it."""
OPEN_MAPS = ("environment", "columns", "sets")
"""Maps whose keys the user chooses."""


@dataclass(frozen=True, kw_only=True)
class Override:
    """One word of the command line, as Hydra's grammar reads it."""

    text: str
    key: str
    value: object
    adds: bool
    deletes: bool

    @property
    def group(self) -> str:
        """The part of the key before a package: `optimizer@stages.sft.optimizer` -> `optimizer`."""
        return self.key.split("@")[0]


def parse_word(text: str) -> Override:
    """One override; ConfigError where it is none, or none that can be obeyed."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(text)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{text!r} is no override ({reason}); type key=value or group=choice, quoted for the shell"
        ) from None
    if parsed.is_sweep_override():
        raise ConfigError(
            f"{text!r} holds several values; give one, a list in brackets (key=[a,b]), or -m for a run each"
        )
    if parsed.key_or_group.split(".")[0].split("/")[0] == "hydra":
        raise ConfigError(f"{text!r} sets Hydra itself, which writes nothing here; the run folder is output_dir/name")
    return Override(
        text=text,
        key=parsed.key_or_group + (f"@{parsed.package}" if parsed.package else ""),
        value=None if parsed.is_delete() else parsed.value(),
        adds=parsed.is_add() or parsed.is_force_add(),
        deletes=parsed.is_delete(),
    )


def chooses_group(word: Override, roots: Sequence[Path]) -> bool:
    """Whether a word chooses a file of a config group; otherwise it sets a value."""
    is_group = any((root / word.group).is_dir() for root in roots)
    return is_group and ("@" in word.key or not isinstance(word.value, dict))


def choices_of(group: str, roots: Sequence[Path]) -> list[str]:
    """Names of the files of a group."""
    return sorted({file.stem for root in roots for file in (root / group).glob("*.yaml") if file.is_file()})


def group_problems(word: Override, roots: Sequence[Path]) -> list[str]:
    """What is wrong with the choice of a group."""
    group = word.group
    choices = choices_of(group, roots)
    if word.deletes:
        return [f"{word.text}: a group cannot be removed; choose one of {', '.join(choices)}"]
    if word.value not in choices:
        guess = nearest(str(word.value), choices)
        hint = f"did you mean {guess}? There are" if guess else "there are"
        return [f"{word.text.lstrip('+')}: there is no such {group}; {hint}: {', '.join(choices)}"]
    if group == "experiment" and not word.adds:
        return [f"{word.text}: an experiment is added; type +{word.text}"]
    if "@" not in word.key and group not in TOP_GROUPS and group != "experiment":
        if group == "hardware":
            return [f"{word.text}: hardware belongs to the cluster; type hardware@cluster.hardware={word.value}"]
        return [f"{word.text}: {group} belongs to a stage; type {group}@stages.sft.{group}={word.value}"]
    if word.adds and group in TOP_GROUPS and "@" not in word.key:
        return [f"{word.text}: {group} is chosen already; type {word.text.lstrip('+')}"]
    return []


def experiment_problems(words: Sequence[Override]) -> list[str]:
    """A run has one experiment."""
    chosen = [word.text for word in words if word.key == "experiment" and word.adds]
    return [f"{' '.join(chosen)}: a run has one experiment; leave out all but one"] if len(chosen) > 1 else []


def key_problems(word: Override, keys: Sequence[str]) -> list[str]:
    """A value override must meet one of the keys that are there; what is added is judged by the types later."""
    if word.adds:
        is_there = word.key in keys and not word.text.startswith("++")
        return [f"{word.text}: this key is there already; type {word.text.lstrip('+')}"] if is_there else []
    if word.key in keys or in_open_map(word.key):
        return []
    guess = _nearest_key(word.key, keys)
    return [f"{word.key}: unknown key" + (f"; did you mean {guess}?" if guess else "")]


def _nearest_key(key: str, keys: Sequence[str]) -> str | None:
    """The key most like this one: first among those that end alike, then as a whole, then by a similar ending."""
    keys = [known for known in sorted(keys) if not any(part == RECIPE for part in known.split("."))]
    last = {known: known.rpartition(".")[2] for known in keys}
    ending = key.rpartition(".")[2]
    alike = [known for known in last if last[known] == ending]
    guess = nearest(key, alike) or nearest(key, keys) or next(iter(alike), None)
    similar = nearest(ending, set(last.values()))
    return guess or next((known for known in last if last[known] == similar), None)


def in_open_map(key: str) -> bool:
    return any(part in OPEN_MAPS for part in key.split(".")[:-1])


def dotted_keys(tree: Any, prefix: str = "") -> list[str]:
    """Every dotted key of a tree, inner nodes too."""
    if not isinstance(tree, dict):
        return []
    keys: list[str] = []
    for name, value in cast("dict[str, Any]", tree).items():
        keys += [prefix + name, *dotted_keys(value, f"{prefix}{name}.")]
    return keys
