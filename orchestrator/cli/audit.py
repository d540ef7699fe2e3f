"""`audit`: prove which rows a run used."""

from __future__ import annotations

import argparse

from orchestrator.cli.arguments import add_run_folder, run_folder_of
from orchestrator.cli.parser import VerbParser


def configure(parser: VerbParser) -> None:
    add_run_folder(parser)


def run(arguments: argparse.Namespace) -> int:
    from orchestrator.commands.audit import audit

    return audit(run_folder_of(arguments))
