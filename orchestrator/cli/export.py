"""`export`: a folder to publish."""

from __future__ import annotations

import argparse

from orchestrator.cli.arguments import add_run_folder, add_stage, number, run_folder_of
from orchestrator.cli.parser import VerbParser


def configure(parser: VerbParser) -> None:
    add_run_folder(parser)
    add_stage(parser, "model of this stage; the last one otherwise")
    parser.add_argument("--to", metavar="FOLDER", help="new folder; RUN_DIR/export otherwise")
    parser.add_argument(
        "--max-kl", type=number, metavar="NATS", help="largest change by merging that is accepted, in nats a token"
    )


def run(arguments: argparse.Namespace) -> int:
    from orchestrator.commands.export import export

    return export(run_folder_of(arguments), stage=arguments.stage, to=arguments.to, max_kl=arguments.max_kl)
