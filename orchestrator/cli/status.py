"""`status`: the state of a run, or of a folder of runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from orchestrator.cli.parser import VerbParser
from orchestrator.errors import ConfigError


def configure(parser: VerbParser) -> None:
    parser.takes = "one run folder, or a folder of runs"
    parser.add_argument("folder", metavar="DIR", help="folder of a run, or of runs")
    parser.add_argument("--watch", action="store_true", help="keep a live table until all have ended")


def run(arguments: argparse.Namespace) -> int:
    from orchestrator.control import show_status

    folder = Path(arguments.folder).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{arguments.folder} is no folder; status takes a run folder, or a folder of runs")
    return show_status(folder.resolve(), watch=arguments.watch)
