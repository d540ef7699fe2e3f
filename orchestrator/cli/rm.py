"""`rm`: delete runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from orchestrator.cli.parser import VerbParser


def configure(parser: VerbParser) -> None:
    parser.takes = "one run folder or more"
    parser.add_argument("folders", nargs="+", metavar="RUN_DIR", help="folders of runs or studies")
    parser.add_argument("-y", "--yes", action="store_true", help="delete without asking")


def run(arguments: argparse.Namespace) -> int:
    from orchestrator.housekeeping.remove import remove_runs

    return remove_runs([Path(folder).expanduser() for folder in arguments.folders], yes=arguments.yes)
