"""`status`: the state of a run, or of a folder of runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from orchestrator.cli.arguments import add_format
from orchestrator.cli.parser import VerbParser
from orchestrator.errors import ConfigError


def configure(parser: VerbParser) -> None:
    parser.takes = "one run folder, or a folder of runs"
    parser.add_argument("folder", metavar="DIR", help="folder of a run, or of runs")
    parser.add_argument("--watch", action="store_true", help="keep a live table until all have ended")
    parser.add_argument(
        "--show",
        metavar="COLUMN,...",
        help="more columns: of metrics.jsonl (lr, grad_norm, memory, ...) or keys (optimizer.lr, tuning.rank, key=seed)",
    )
    add_format(parser)


def run(arguments: argparse.Namespace) -> int:
    from orchestrator.display.status_table import show_status

    folder = Path(arguments.folder).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{arguments.folder} is not a folder; status takes a run folder, or a folder of runs")
    extra = [] if arguments.show is None else [name.strip() for name in arguments.show.split(",") if name.strip()]
    as_json = arguments.format == "json"
    if as_json and arguments.watch:
        raise ConfigError("--watch and format=json: give one of them")
    return show_status(folder.resolve(), watch=arguments.watch, extra=extra, as_json=as_json)
