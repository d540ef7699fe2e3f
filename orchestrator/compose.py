"""Hydra composes the configuration once, on the login side; every unknown word is told with the nearest real one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config.base import JsonValue
from orchestrator.config.run import RunConfig, parse
from orchestrator.errors import ConfigError, nearest

CONF = Path(__file__).resolve().parent.parent / "conf"


@dataclass(frozen=True, kw_only=True)
class Override:
    """One word of the command line, as Hydra's grammar reads it."""

    text: str
    key: str
    value: object
    adds: bool
    deletes: bool


def compose(overrides: Sequence[str], *, config_directory: Path | None = None) -> RunConfig:
    """The validated configuration; raises ConfigError with every problem of words, keys, types and rules."""
    roots = _roots(config_directory)
    words = [_parse_word(text) for text in overrides]
    groups = [word for word in words if _group_of(word, roots) is not None]
    values = [word for word in words if word not in groups]
    faulty = {word.text: problem for word in groups for problem in _group_problems(word, roots)}
    if any(word.text in faulty and word.key == "experiment" for word in groups):
        raise ConfigError(list(faulty.values()))  # without its experiment every other word would look wrong
    known = _compose([word.text for word in groups if word.text not in faulty], roots)
    faulty |= {word.text: problem for word in values for problem in _key_problems(word, known)}
    accepted = [word.text for word in words if word.text not in faulty]
    return _validate(_compose(accepted, roots), list(faulty.values()), roots)


def experiments(config_directory: Path | None = None) -> list[str]:
    """Names that may follow +experiment=."""
    return _choices("experiment", _roots(config_directory))


def _validate(values: dict[str, JsonValue], problems: list[str], roots: Sequence[Path]) -> RunConfig:
    try:
        config = parse(values)
    except ConfigError as error:
        raise ConfigError([*problems, *(_with_place(problem, roots) for problem in error.problems)]) from None
    if problems:
        raise ConfigError(problems)
    return config


def _roots(config_directory: Path | None) -> list[Path]:
    if config_directory is None:
        return [CONF]
    if not config_directory.is_dir():
        raise ConfigError(f"--config-dir: {config_directory} is no folder")
    return [config_directory.resolve(), CONF]


def _parse_word(text: str) -> Override:
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
        raise ConfigError(f"{text!r} holds several values; add -m to run each of them")
    return Override(
        text=text,
        key=parsed.key_or_group + (f"@{parsed.package}" if parsed.package else ""),
        value=None if parsed.is_delete() else parsed.value(),
        adds=parsed.is_add() or parsed.is_force_add(),
        deletes=parsed.is_delete(),
    )


def _compose(overrides: Sequence[str], roots: Sequence[Path]) -> dict[str, JsonValue]:
    """The composed tree as plain values; interpolations resolved."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    extra = [f"hydra.searchpath=[{','.join('file://' + str(root) for root in roots[:-1])}]"] if len(roots) > 1 else []
    try:
        with initialize_config_dir(config_dir=str(roots[-1]), version_base="1.3"):
            tree = hydra_compose("config", overrides=[*extra, *overrides])
        plain: Any = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(" ".join(str(error).split())) from None
    return plain


def _group_of(word: Override, roots: Sequence[Path]) -> str | None:
    """The config group that an override chooses from, or None where it sets a value."""
    group = word.key.split("@")[0]
    is_group = any((root / group).is_dir() for root in roots)
    return group if is_group and ("@" in word.key or isinstance(word.value, str) or word.deletes) else None


def _choices(group: str, roots: Sequence[Path]) -> list[str]:
    return sorted({file.stem for root in roots for file in (root / group).glob("*.yaml")})


TOP_GROUPS = ("model", "tuning", "quantization", "sharding", "cluster", "launcher", "tracking")


def _group_problems(word: Override, roots: Sequence[Path]) -> list[str]:
    group = word.key.split("@")[0]
    choices = _choices(group, roots)
    if word.deletes:
        return [f"{word.text}: a group cannot be removed; choose one of {', '.join(choices)}"]
    if word.value not in choices:
        guess = nearest(str(word.value), choices)
        hint = f"; did you mean {guess}?" if guess else ";"
        return [f"{word.key}={word.value}: there is no such {group}{hint} There are: {', '.join(choices)}"]
    if group == "experiment" and not word.adds:
        return [f"{word.text}: an experiment is added; type +{word.text}"]
    if "@" not in word.key and group not in TOP_GROUPS and group != "experiment":
        return [f"{word.text}: {group} belongs to a stage; type {group}@stages.sft.{group}={word.value}"]
    if word.adds and group in TOP_GROUPS:
        return [f"{word.text}: {group} is chosen already; type {word.text.lstrip('+')}"]
    return []


def _key_problems(word: Override, known: dict[str, JsonValue]) -> list[str]:
    """A value override must meet a key that is there; additions are judged by the types later."""
    if word.adds or word.key.startswith("hydra."):
        return []
    keys = set(_flatten(known))
    parts = word.key.split(".")
    if word.key in keys or any(".".join(parts[:depth]) in _open_maps(known) for depth in range(1, len(parts))):
        return []
    same_ending = sorted(key for key in keys if key.split(".")[-1] == parts[-1])
    guess = nearest(word.key, same_ending) or nearest(word.key, keys) or next(iter(same_ending), None)
    return [f"{word.key}: unknown key" + (f"; did you mean {guess}?" if guess else "")]


def _open_maps(known: dict[str, JsonValue]) -> set[str]:
    """Maps whose keys the user chooses."""
    return {key for key in _flatten(known) if key.split(".")[-1] in ("environment", "columns")}


def _flatten(tree: JsonValue, prefix: str = "") -> list[str]:
    """Every dotted key of a tree, inner nodes too."""
    if not isinstance(tree, dict):
        return []
    keys: list[str] = []
    for name, value in tree.items():
        keys += [prefix + name, *_flatten(value, f"{prefix}{name}.")]
    return keys


def _with_place(problem: str, roots: Sequence[Path]) -> str:
    """Adds file and line where an unknown key stands in a YAML file of the tree."""
    key, separator, _ = problem.partition(": unknown key")
    if not separator:
        return problem
    name = key.split(".")[-1]
    for root in roots:
        for file in sorted(root.rglob("*.yaml")):
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
                if line.strip().startswith(f"{name}:") or f"{{{name}:" in line or f", {name}:" in line:
                    return f"{file}:{number} {problem}"
    return problem
