"""`check`: the complete inspection before a run."""

from __future__ import annotations

import argparse

from orchestrator.cli.arguments import add_overrides, overrides_of
from orchestrator.cli.parser import VerbParser


def configure(parser: VerbParser) -> None:
    add_overrides(parser)


def run(arguments: argparse.Namespace) -> int:
    from orchestrator.commands.check import check

    return check(overrides_of(arguments))
