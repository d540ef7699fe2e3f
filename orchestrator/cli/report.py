"""`report`: what a study has found so far."""

from __future__ import annotations

import argparse
from pathlib import Path

from orchestrator.cli.parser import VerbParser


def configure(parser: VerbParser) -> None:
    parser.takes = "one folder of a study and nothing else"
    parser.add_argument("folder", metavar="STUDY_DIR", help="folder of a study: output_dir/NAME-study")


def run(arguments: argparse.Namespace) -> int:
    from orchestrator.commands.report import report

    return report(Path(arguments.folder).expanduser().resolve())
