"""`logs`: the end of a run's newest log."""

from __future__ import annotations

import argparse

from orchestrator.cli.arguments import add_run_folder, add_stage, run_folder_of, whole_number
from orchestrator.cli.parser import VerbParser


def configure(parser: VerbParser) -> None:
    add_run_folder(parser)
    add_stage(parser, "log of this stage (default: all of them)")
    parser.add_argument("--node", type=whole_number(0), metavar="N", help="log of this node, from 0")
    parser.add_argument(
        "-n",
        "--lines",
        type=whole_number(0),
        metavar="N",
        help="last lines of each log; 0 shows all, 40 are the default",
    )
    parser.add_argument("-f", "--follow", action="store_true", help="keep printing new lines until the run ends")


def run(arguments: argparse.Namespace) -> int:
    from orchestrator.display.log_text import show_logs

    run_folder = run_folder_of(arguments)
    return show_logs(
        run_folder, stage=arguments.stage, node=arguments.node, lines=arguments.lines, follow=arguments.follow
    )
