"""`keys`: the reference of every key and group."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from orchestrator.cli.arguments import add_format
from orchestrator.cli.parser import VerbParser
from orchestrator.errors import EXIT_DONE, ConfigError

if TYPE_CHECKING:
    from orchestrator.composition.key_reference import Key

INTRODUCTION = """\
# Keys

Every key of the configuration: what it takes, its default in `conf/`, and what it means. Written by `make docs-keys` from the types in
`orchestrator/config/` and from `conf/`; `python -m orchestrator keys PATTERN` prints the same. STAGE, SET and NAME stand for names of
your own; an entry of a list has a number from 0. `(lora)` after a key: only that choice has it.
"""


def configure(parser: VerbParser) -> None:
    parser.takes = "one pattern, or nothing"
    parser.add_argument(
        "pattern", nargs="?", default="", metavar="PATTERN", help="part of a key, or a glob such as '*.lr'"
    )
    parser.add_argument("--markdown", action="store_true", help="the whole page docs/keys.md")
    add_format(parser)


def run(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from orchestrator.composition.key_reference import reference
    from orchestrator.composition.key_search import matching
    from orchestrator.config.key_hints import ALIASES, key_hint

    every = reference()
    pattern: str = arguments.pattern
    found = matching(every, pattern)
    if not found:
        alias = ALIASES.get(pattern.lower())
        if alias is None:
            names = [key.name for key in every]
            raise ConfigError(
                f"{pattern}: no key contains this{key_hint(pattern, names) or '; type keys without a pattern for all'}"
            )
        print(f"{pattern} is {alias} here")
        found = matching(every, alias.partition("=")[0])
    if arguments.markdown:
        print(page(found), end="")
    elif arguments.format == "json":
        print(json.dumps([asdict(key) for key in found], indent=2))
    else:
        print("\n".join(_lines(found)))
    return EXIT_DONE


def page(keys: Sequence[Key]) -> str:
    """docs/keys.md."""
    lines = [INTRODUCTION]
    sections: dict[str, list[Key]] = {}
    for key in keys:
        sections.setdefault(_section(key.name), []).append(key)
    for name, members in sections.items():
        lines += [f"## {name}", "", "| key | takes | default | meaning |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(_cells(key))} |" for key in members]
        lines.append("")
    return "\n".join(lines)


def _section(name: str) -> str:
    if "=" in name:
        return "Groups"
    parts = name.split(".")
    if len(parts) == 1:
        return "The run"
    return (
        ".".join(parts[:3])
        if parts[0] == "stages" and len(parts) > 3
        else ".".join(parts[:2] if parts[0] == "stages" else parts[:1])
    )


def _cells(key: Key) -> Iterable[str]:
    only = f" ({', '.join(key.only)})" if key.only else ""
    unit = f", {key.unit}" if key.unit else ""
    cells = (f"`{key.name}`{only}", f"{key.type}{unit}", f"`{key.default}`" if key.default else "", key.sentence)
    return [cell.replace("|", "\\|") for cell in cells]


def _lines(keys: Sequence[Key]) -> Iterable[str]:
    import shutil
    import textwrap

    width = max(shutil.get_terminal_size().columns, 40)
    for key in keys:
        only = f" ({', '.join(key.only)})" if key.only else ""
        unit = f", {key.unit}" if key.unit else ""
        default = "" if key.default == "no default" else f"   default {key.default}"
        yield f"{key.name}{only}   {key.type}{unit}{default}"
        yield from textwrap.wrap(key.sentence, width=width, initial_indent="    ", subsequent_indent="    ")
