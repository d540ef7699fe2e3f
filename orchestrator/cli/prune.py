"""`prune`: delete what runs and the cache no longer need."""

from __future__ import annotations

import argparse
from pathlib import Path

from orchestrator.cli.parser import VerbParser


def configure(parser: VerbParser) -> None:
    parser.takes = "run folders, or folders of runs"
    parser.add_argument(
        "folders", nargs="*", metavar="DIR", help="folders of runs, or that hold runs (default: ./runs)"
    )
    parser.add_argument("-y", "--yes", action="store_true", help="delete without asking")
    parser.add_argument("--dry-run", action="store_true", help="only list what could go")


def run(arguments: argparse.Namespace) -> int:
    from orchestrator.housekeeping.prune import prune

    folders = [Path(folder).expanduser() for folder in arguments.folders or ["runs"]]
    return prune(folders, yes=arguments.yes, dry_run=arguments.dry_run)
