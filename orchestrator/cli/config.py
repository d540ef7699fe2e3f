"""`config`: the composed configuration, with the source of every value."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.cli.arguments import add_format, add_overrides, open_run_folder, overrides_of
from orchestrator.cli.parser import VerbParser
from orchestrator.errors import EXIT_DONE, ConfigError

if TYPE_CHECKING:
    from orchestrator.composition.provenance import Sourced

COLUMN = 64
"""Rightmost column at which comments are aligned; longer lines push theirs to the right."""


def configure(parser: VerbParser) -> None:
    add_overrides(parser)
    parser.takes = "overrides and a part of the configuration, or one run folder"
    parser.add_argument("--diff", action="store_true", help="only what differs from the experiment alone")
    add_format(parser)


def run(arguments: argparse.Namespace) -> int:
    given = overrides_of(arguments)
    from orchestrator.run_folder.folder import RunFolder

    folders = [text for text in given if _may_be_folder(text) and RunFolder(Path(text).expanduser()).is_run]
    if folders:
        return _print_frozen(folders, [text for text in given if text not in folders], arguments)
    for text in given:
        if _may_be_folder(text) and any(Path(text).expanduser().glob("*/run.json")):
            open_run_folder(text)  # refuses a folder of runs, and names a run inside it
    from orchestrator.composition.provenance import experiment_alone, sourced

    directory = None if arguments.config_dir is None else Path(arguments.config_dir).expanduser()
    parts = [text for text in arguments.overrides if _is_part(text, directory)]
    overrides = [text for text in arguments.overrides if text not in parts]
    found = sourced(overrides, config_directory=directory)
    if found.problems:
        raise ConfigError(found.problems)
    before = sourced(experiment_alone(overrides), config_directory=directory) if arguments.diff else None
    _print(found, parts, arguments.format, before=before)
    return EXIT_DONE


def _may_be_folder(text: str) -> bool:
    """Not for `~key`, which deletes a key: it would be expanded as a user's home."""
    return bool(text) and "=" not in text and (not text.startswith("~") or text.startswith("~/"))


def _is_part(text: str, directory: Path | None) -> bool:
    """Whether an argument is a dotted key, which selects the part to print."""
    from orchestrator.composition.compose import roots_of
    from orchestrator.composition.experiment_file import is_experiment_file
    from orchestrator.composition.mistaken_arguments import bare_argument_problem

    is_dotted = bool(text) and text.replace(".", "").replace("_", "").isalnum()
    if not is_dotted or is_experiment_file(text):
        return False
    from orchestrator.composition.overrides import TOP_GROUPS

    return text in TOP_GROUPS or bare_argument_problem(text, roots_of(directory)) is None


def _print_frozen(folders: Sequence[str], rest: Sequence[str], arguments: argparse.Namespace) -> int:
    """The configuration that a run was started with."""
    from orchestrator.composition.provenance import Sourced
    from orchestrator.run_state.freeze import read_config

    if len(folders) > 1 or any("=" in text for text in rest) or arguments.diff:
        raise ConfigError(
            f"{folders[0]} is a run: type config {folders[0]}, or add a part of it; compare shows two runs"
        )
    folder = open_run_folder(folders[0])
    frozen = Sourced(values=read_config(folder), sources={}, problems=())
    _print(frozen, list(rest), arguments.format, before=None)
    return EXIT_DONE


def _print(found: Sourced, parts: Sequence[str], form: str, *, before: Sourced | None) -> None:
    from orchestrator.composition.overrides import dotted_keys
    from orchestrator.composition.provenance import leaves
    from orchestrator.config.key_hints import key_hint

    keys = dotted_keys(found.values)
    unknown = [f"{part}: unknown key{key_hint(part, keys)}" for part in parts if part not in keys]
    if unknown:
        raise ConfigError(unknown)
    shown = {key: value for key, value in leaves(found.values) if _is_wanted(key, parts)}
    old = {} if before is None else dict(leaves(before.values))
    if before is not None:
        shown = {key: value for key, value in shown.items() if key not in old or old[key] != value}
    if form == "json":
        print(
            json.dumps({"config": _nested(shown), "sources": {key: found.sources.get(key) for key in shown}}, indent=2)
        )
        return
    comments = {key: found.sources.get(key, "") for key in shown}
    if before is not None:
        comments = {key: f"{text}{_was(key, old, before)}" for key, text in comments.items()}
    print("\n".join(_yaml(_nested(shown), comments)) or "# nothing differs from the experiment alone")
    if before is not None:
        now = dict(leaves(found.values))
        for key in [key for key in old if key not in now and _is_wanted(key, parts)]:
            print(f"# gone: {key}: {_plain(old[key])} ({before.sources.get(key, '')})")


def _is_wanted(key: str, parts: Sequence[str]) -> bool:
    return not parts or any(f"{key}.".startswith(f"{part}.") for part in parts)


def _was(key: str, old: Mapping[str, Any], before: Sourced) -> str:
    return f"; {_plain(old[key])} in {before.sources.get(key, '')}" if key in old else "; new"


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *above, last = key.split(".")
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def _yaml(tree: Mapping[str, Any], comments: Mapping[str, str]) -> list[str]:
    """Lines of YAML, with the source of each leaf as a comment."""
    lines = list(_lines(tree, "", 0))
    widths = [len(text) for text, key in lines if key is not None and len(text) <= COLUMN]
    column = max(widths, default=0) + 2
    return [f"{text:<{column}}# {comments[key]}" if key and comments.get(key) else text for text, key in lines]


def _lines(tree: Mapping[str, Any], prefix: str, depth: int) -> Iterator[tuple[str, str | None]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield f"{'  ' * depth}{name}:", None
            yield from _lines(value, f"{prefix}{name}.", depth + 1)  # pyright: ignore[reportUnknownArgumentType]
        else:
            yield f"{'  ' * depth}{name}: {_plain(value)}", f"{prefix}{name}"


def _plain(value: Any) -> str:
    """A value on one line of YAML."""
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return text.removesuffix("...\n").strip()
