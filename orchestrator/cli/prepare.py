"""`prepare`: tokenise and pack the data before a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from orchestrator.cli.arguments import add_overrides, open_run_folder, overrides_of
from orchestrator.cli.parser import VerbParser


def configure(parser: VerbParser) -> None:
    add_overrides(parser)
    parser.takes = "overrides, or one run folder"


def run(arguments: argparse.Namespace) -> int:
    from orchestrator.commands.prepare import prepare, prepare_run

    overrides: list[str] = arguments.overrides
    if len(overrides) == 1 and Path(overrides[0]).expanduser().is_dir():
        return prepare_run(open_run_folder(overrides[0]))
    return prepare(overrides_of(arguments))
