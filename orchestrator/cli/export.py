"""`export`: a folder to publish."""

from __future__ import annotations

import argparse

from orchestrator.cli.arguments import add_run_folder, add_stage, number, run_folder_of
from orchestrator.cli.parser import VerbParser


def configure(parser: VerbParser) -> None:
    add_run_folder(parser)
    add_stage(parser, "model of this stage (default: the last one)")
    parser.add_argument("--to", metavar="FOLDER", help="new folder (default: RUN_DIR/export)")
    parser.add_argument(
        "--max-kl", type=number, metavar="NATS", help="largest accepted change from merging, in nats per token"
    )


def run(arguments: argparse.Namespace) -> int:
    from orchestrator.commands.export import export

    return export(run_folder_of(arguments), stage=arguments.stage, to=arguments.to, max_kl=arguments.max_kl)
