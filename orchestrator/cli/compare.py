"""`compare`: runs side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from orchestrator.cli.arguments import add_format
from orchestrator.cli.parser import VerbParser


def configure(parser: VerbParser) -> None:
    parser.takes = "two run folders or more, or a folder of runs"
    parser.add_argument("folders", nargs="+", metavar="RUN_DIR", help="folders of runs, or a folder that holds runs")
    add_format(parser)


def run(arguments: argparse.Namespace) -> int:
    from orchestrator.display.run_comparison_table import show_comparison

    folders = [Path(folder).expanduser() for folder in arguments.folders]
    return show_comparison(folders, as_json=arguments.format == "json")
