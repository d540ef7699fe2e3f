"""`doctor`: this machine, installed versions and a check of what works."""

from __future__ import annotations

import argparse

from orchestrator.cli.parser import VerbParser


def configure(parser: VerbParser) -> None:
    del parser  # no arguments


def run(arguments: argparse.Namespace) -> int:
    from orchestrator.commands.doctor import report

    del arguments
    return report()
