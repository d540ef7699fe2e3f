"""Print docs/verbs.md: every verb with its arguments, as the parser of its own help knows them. `make docs-verbs` runs it."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator

from orchestrator.cli.parser import HELP, PROGRAM, VerbParser, parser_of
from orchestrator.cli.verbs import GROUPS, VERBS, Verb

INTRODUCTION = """\
# Verbs

Every verb of `python -m orchestrator`, with its arguments and examples. Written by `make docs-verbs` from what `VERB --help` prints.
Options may come anywhere on the line, and settings anywhere among the overrides. The console script `orchestrator` is the same program.
"""


def page() -> str:
    """The whole of docs/verbs.md."""
    lines = [INTRODUCTION]
    for group in GROUPS:
        lines += [f"## {group}", ""]
        for verb in VERBS.values():
            if verb.group == group:
                lines += section(verb)
    return "\n".join(lines)


def section(verb: Verb) -> Iterator[str]:
    """Heading, description, synopsis, tables of arguments and settings, examples."""
    parser = parser_of(verb)
    options = [
        action for action in dict.fromkeys(parser.options.values()) if not set(HELP) & set(action.option_strings)
    ]
    yield from (f"### {verb.name}", "")
    yield from (parser.description or "").splitlines()
    synopsis = [verb.name, *map(repeated, parser.positionals), *(["[OPTIONS]"] if options else [])]
    yield from ("", f"`{PROGRAM} {' '.join(synopsis)}`", "")
    yield from table("argument", ((spelling(action), action.help or "") for action in [*parser.positionals, *options]))
    yield from table("setting", settings(parser))
    yield from ("```bash", *(f"{PROGRAM} {example}" for example in verb.examples), "```", "")


def repeated(action: argparse.Action) -> str:
    """A positional as the synopsis shows it: how often it may be given."""
    name = str(action.metavar)
    if " " in name:  # it says so itself
        return name
    return {"*": f"[{name} ...]", "+": f"{name} ...", "?": f"[{name}]"}.get(str(action.nargs), name)


def spelling(action: argparse.Action) -> str:
    """`-n N`, `--lines N` for an option, the name for a positional."""
    value = "" if action.nargs == 0 else f" {action.metavar}"
    return ", ".join(f"`{option}{value}`" for option in action.option_strings) or f"`{action.metavar}`"


def settings(parser: VerbParser) -> Iterator[tuple[str, str]]:
    """Settings with their defaults; the help of one is its values and, after spaces, their meaning."""
    for setting in parser.settings.values():
        values, _, meaning = setting.help.partition(" ")
        yield f"`{setting.name}={values}`", f"{meaning.strip()} (default: {setting.default})"


def table(title: str, rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    cells = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    if cells:
        yield from (f"| {title} | meaning |", "|---|---|", *(f"| {row} |" for row in cells), "")


if __name__ == "__main__":
    print(page(), end="")
