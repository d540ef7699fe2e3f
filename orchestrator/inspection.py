"""The verbs that read a run folder or the machine: status, logs, cancel, generate, report, doctor. Must not import torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from orchestrator.cli import run_folder_argument
from orchestrator.config.classification import CLASSIFIER_KINDS
from orchestrator.errors import EXIT_DONE, ConfigError
from orchestrator.rundir import MANIFEST, RunFolder, read_json


def status(arguments: Sequence[str]) -> int:
    """Where a run stands, or every run of an output folder; --watch keeps a live table."""
    from orchestrator.control import show_status

    options, folders = split_options(arguments, flags=("--watch",))
    if len(folders) != 1 or not Path(folders[0]).is_dir():
        raise ConfigError("status takes one run folder, or a folder of runs: python -m orchestrator status runs/NAME")
    return show_status(Path(folders[0]).resolve(), watch="--watch" in options)


def logs(arguments: Sequence[str]) -> int:
    """The end of the newest log; -f follows it."""
    from orchestrator.control import show_logs

    options, folders = split_options(arguments, flags=("-f", "--follow"), with_value=("--stage", "--node"))
    node = options.get("--node")
    if node is not None and not node.isdigit():
        raise ConfigError(f"--node {node}: a number from 0 is needed")
    run = RunFolder(run_folder_argument(folders, "logs"))
    follow = "-f" in options or "--follow" in options
    return show_logs(run, stage=options.get("--stage"), node=None if node is None else int(node), follow=follow)


def cancel(arguments: Sequence[str]) -> int:
    """Asks every unfinished stage to save and end; what does not, is ended."""
    from orchestrator.commands import load_config
    from orchestrator.control import cancel as cancel_run

    run = RunFolder(run_folder_argument(arguments, "cancel"))
    return cancel_run(run, load_config(run))


def generate(arguments: Sequence[str]) -> int:
    """Answers of the tuned model beside those of its base; a classifier's classes."""
    wanted = ("--prompt", "--stage", "--examples", "--max-new-tokens")
    options, folders = split_options(arguments, with_value=wanted)
    folder = RunFolder(run_folder_argument(folders, "generate"))
    stage = _stage_of(folder, options.get("--stage"), "make a policy or a classifier", CLASSIFIER_KINDS)
    for name in ("--examples", "--max-new-tokens"):
        if not options.get(name, "1").isdigit():
            raise ConfigError(f"{name} {options[name]}: a number is needed")
    if not folder.stage(stage).result.exists():
        raise ConfigError(f"{stage} is not done: there is no {folder.stage(stage).result}; see `status {folder.root}`")
    words = [word for name, value in options.items() if name != "--stage" for word in (name, value)]
    argv = [sys.executable, "-m", "orchestrator.training.generate", str(folder.run), "--stage", stage, *words]
    return subprocess.run(argv, env={**os.environ, "PYTHONSAFEPATH": "1"}, check=False).returncode


def export(arguments: Sequence[str]) -> int:
    """A folder that can be published: adapter merged, measured, with a card, opened again."""
    options, folders = split_options(arguments, with_value=("--stage", "--to", "--max-kl"))
    folder = RunFolder(run_folder_argument(folders, "export"))
    stage = _stage_of(folder, options.get("--stage"), "make a policy", ())
    if not folder.stage(stage).result.exists():
        raise ConfigError(f"{stage} is not done: there is no {folder.stage(stage).result}; see `status {folder.root}`")
    _refuse_what_cannot_be_merged(folder, stage)
    target = Path(options.get("--to", str(folder.root / "export"))).expanduser().resolve()
    if target.exists() and not (target / MANIFEST).is_file() and any(target.iterdir()):
        raise ConfigError(f"--to {target}: it is there and was not made by export; give a new folder")
    words = ["--max-kl", options["--max-kl"]] if "--max-kl" in options else []
    argv = [
        sys.executable,
        "-m",
        "orchestrator.training.export",
        str(folder.run),
        "--stage",
        stage,
        "--to",
        str(target),
        *words,
    ]
    return subprocess.run(argv, env={**os.environ, "PYTHONSAFEPATH": "1"}, check=False).returncode


def _refuse_what_cannot_be_merged(folder: RunFolder, stage: str) -> None:
    from orchestrator.config.adapters import ADAPTER_TUNINGS
    from orchestrator.config.limits import why_no_merge
    from orchestrator.config.run import RunConfig

    tuning = RunConfig.model_validate(read_json(folder.run)["config"], strict=False).tuning
    reason = why_no_merge(tuning) if isinstance(tuning, ADAPTER_TUNINGS) else None
    if reason is not None:
        raise ConfigError(f"export: {reason}; publish the folder {folder.stage(stage).artifact} itself")


def _stage_of(folder: RunFolder, chosen: str | None, what: str, more: tuple[str, ...]) -> str:
    """The stage asked for, or the last one that makes a policy; `more` kinds are allowed too, `what` says it in words."""
    from orchestrator.commands import load_config
    from orchestrator.config.run import POLICY_KINDS, made_kind

    config = load_config(folder)
    kinds = (*POLICY_KINDS, *more)
    policies = [name for name in config.pipeline if made_kind(config, name) in kinds]
    stage = chosen or (policies[-1] if policies else "")
    if stage not in policies:
        given = f"--stage {stage}" if stage else str(folder.root)
        raise ConfigError(f"{given}: the stages that {what} are {', '.join(policies) or 'none'}")
    return stage


def report(arguments: Sequence[str]) -> int:
    """What a study has found so far, from its folder; writes the files of its report."""
    from orchestrator.study.report import write_report
    from orchestrator.study.trials import StudyFolder

    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise ConfigError(
            "report takes one folder of a study and nothing else: python -m orchestrator report runs/NAME-study"
        )
    print(write_report(StudyFolder(Path(arguments[0]).resolve())))
    return EXIT_DONE


def doctor(arguments: Sequence[str]) -> int:
    """The machine, the versions, what works and the first cause of what does not."""
    from orchestrator.doctor import report

    if arguments:
        raise ConfigError(f"doctor takes no arguments, not {arguments[0]}")
    return report()


def split_options(
    arguments: Sequence[str], *, flags: Sequence[str] = (), with_value: Sequence[str] = ()
) -> tuple[dict[str, str], list[str]]:
    """Options by name (a flag's value is empty), and the other words."""
    options: dict[str, str] = {}
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if word in flags:
            options[word] = ""
        elif name in with_value:
            given = value if equals else next(words, None)
            if given is None:
                raise ConfigError(f"{name}: a value must follow")
            options[name] = given
        elif word.startswith("-"):
            raise ConfigError(f"{word}: no such option; there are {', '.join((*flags, *with_value)) or 'none'}")
        else:
            rest.append(word)
    return options, rest
