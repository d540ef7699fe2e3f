"""The verbs that read a run folder or the machine: status, logs, cancel, generate, doctor. Must not import torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from orchestrator.attempts import read_attempts
from orchestrator.cli import run_folder_argument
from orchestrator.commands import load_config
from orchestrator.errors import EXIT_DONE, ConfigError
from orchestrator.metrics.console import line
from orchestrator.metrics.jsonl import read_rows
from orchestrator.rundir import RunFolder, StageFolder, read_json, write_text

LOG_LINES = 40


def status(arguments: Sequence[str]) -> int:
    """One line a stage: state, last step, attempts."""
    folder = RunFolder(run_folder_argument(arguments, "status"))
    config = load_config(folder)
    print(f"{config.name}: {folder.root}")
    for name in config.pipeline:
        print(f"  {name}: {_stage_state(folder.stage(name))}")
    return EXIT_DONE


def logs(arguments: Sequence[str]) -> int:
    """The end of the newest log of every stage."""
    folder = RunFolder(run_folder_argument(arguments, "logs"))
    for name in load_config(folder).pipeline:
        files = sorted(folder.stage(name).logs.glob("*.log"), key=lambda file: file.stat().st_mtime)
        if not files:
            print(f"{name}: no log yet")
            continue
        print(f"==> {files[-1]}")
        print("\n".join(files[-1].read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]))
    return EXIT_DONE


def cancel(arguments: Sequence[str]) -> int:
    """Asks every unfinished stage to save and end."""
    folder = RunFolder(run_folder_argument(arguments, "cancel"))
    for name in load_config(folder).pipeline:
        files = folder.stage(name)
        if files.root.is_dir() and not files.result.exists():
            write_text(files.stop, "cancel\n")
            print(f"{name}: asked to save and end at its next step")
    return EXIT_DONE


def generate(arguments: Sequence[str]) -> int:
    """Answers of the tuned model beside those of its base."""
    options, folders = _split_options(arguments, with_value=("--prompt", "--stage", "--max-new-tokens"))
    folder = RunFolder(run_folder_argument(folders, "generate"))
    config = load_config(folder)
    stage = options.get("--stage", config.pipeline[-1])
    if stage not in config.pipeline:
        raise ConfigError(f"--stage {stage}: the run has {', '.join(config.pipeline)}")
    if not folder.stage(stage).result.exists():
        raise ConfigError(
            f"{stage} is not done: there is no {folder.stage(stage).result}; see `orchestrator status {folder.root}`"
        )
    words = [word for name, value in options.items() if name != "--stage" for word in (name, value)]
    argv = [sys.executable, "-m", "orchestrator.training.generate", str(folder.run), "--stage", stage, *words]
    return subprocess.run(argv, env={**os.environ, "PYTHONSAFEPATH": "1"}, check=False).returncode


def doctor(arguments: Sequence[str]) -> int:
    """The machine, the versions, what works and the first cause of what does not."""
    from orchestrator.doctor import report

    if arguments:
        raise ConfigError(f"doctor takes no arguments, not {arguments[0]}")
    return report()


def _stage_state(folder: StageFolder) -> str:
    rows = [row for row in read_rows(folder.metrics) if "step" in row]
    last = "" if not rows else f"; last: {line(rows[-1], _total_steps(folder))}"
    attempts = read_attempts(folder) if folder.attempts.is_dir() else []
    if folder.result.exists():
        return f"finished in {len(attempts)} attempt(s); artifact {read_json(folder.result)['artifact']['path']}"
    if not attempts:
        return ("running or lost" if rows else "not started") + last
    newest = attempts[-1]
    return f"{newest.state} in attempt {newest.number} at step {newest.step}: {newest.why}{last}"


def _total_steps(folder: StageFolder) -> int:
    steps = [row["steps"] for row in read_rows(folder.events) if isinstance(row.get("steps"), int)]
    return int(str(steps[-1])) if steps else 0


def _split_options(arguments: Sequence[str], *, with_value: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    options: dict[str, str] = {}
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        name, _, value = word.partition("=")
        if name in with_value:
            options[name] = value or next(words, "")
        elif word.startswith("-"):
            raise ConfigError(f"{word}: no such option; there are {', '.join(with_value)}")
        else:
            rest.append(word)
    return options, rest
