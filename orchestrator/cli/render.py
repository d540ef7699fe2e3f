"""`render`: write and print the scripts."""

from __future__ import annotations

import argparse

from orchestrator.cli.arguments import add_overrides, overrides_of
from orchestrator.cli.parser import VerbParser


def configure(parser: VerbParser) -> None:
    add_overrides(parser, multirun=True)


def run(arguments: argparse.Namespace) -> int:
    from orchestrator.commands.render import render

    return render(overrides_of(arguments))
