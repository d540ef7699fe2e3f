"""`fork`: a new run from another's checkpoint or artifact."""

from __future__ import annotations

import argparse

from orchestrator.cli.arguments import add_stage, one_of, open_run_folder, whole_number
from orchestrator.cli.parser import VerbParser
from orchestrator.errors import ConfigError


def configure(parser: VerbParser) -> None:
    parser.takes = "one run folder and the overrides of the new run"
    parser.add_argument(
        "words", nargs="+", metavar="RUN_DIR name=NAME [key=value ...]", help="the parent; what the fork changes"
    )
    add_stage(parser, "stage to fork (default: the interrupted one, or the last that trained)")
    parser.add_argument(
        "--from",
        dest="source",
        type=one_of("checkpoint", "artifact"),
        metavar="SOURCE",
        help="checkpoint keeps optimizer state and step; artifact trains on from step 0 (the default where the stage is finished)",
    )
    parser.add_argument(
        "--step", type=whole_number(1), metavar="N", help="checkpoint of this step (default: the newest proven one)"
    )
    parser.add_argument("--no-start", action="store_true", help="only write the new run folder; `resume` starts it")
    parser.add_argument("--dry-run", action="store_true", help="only print what would be done")


def run(arguments: argparse.Namespace) -> int:
    from orchestrator.commands.fork import fork

    folders = [word for word in arguments.words if "=" not in word]
    if len(folders) != 1:
        raise ConfigError("fork takes one run folder and overrides: fork runs/a name=b stages.sft.optimizer.lr=1e-4")
    return fork(
        open_run_folder(folders[0]),
        [word for word in arguments.words if "=" in word],
        stage=arguments.stage,
        source=arguments.source,
        step=arguments.step,
        until="describe" if arguments.dry_run else "write" if arguments.no_start else "train",
    )
