"""The verb generate. Must not import torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from orchestrator.commands.stage_choice import stage_of
from orchestrator.config.run import CLASSIFIER_KINDS
from orchestrator.errors import ConfigError
from orchestrator.run_folder.folder import RunFolder

FOREGROUND = "orchestrator.metrics.foreground"


GENERATING = ("--max-new-tokens", "--system", "--temperature", "--top-p", "--seed", "--output")
"""Options of `generate` that do not apply to a classifier."""


def generate(folder: RunFolder, *, stage: str | None, options: Mapping[str, str]) -> int:
    """Answers of the tuned model next to those of its base; a classifier's classes. `options` are passed to the
    generating process.
    """
    stage = stage_of(folder, stage, "make a policy or a classifier", CLASSIFIER_KINDS)
    if not folder.stage(stage).result.exists():
        raise ConfigError(f"{stage} is not done: there is no {folder.stage(stage).result}; see `status {folder.root}`")
    _refuse_before_loading(folder, stage, options)
    arguments = [f"{name}={value}" for name, value in options.items()]  # joined: a value may begin with a dash
    argv = [
        sys.executable,
        "-m",
        FOREGROUND,
        "evaluation.compare_with_base",
        str(folder.run),
        "--stage",
        stage,
        *arguments,
    ]
    return subprocess.run(argv, env={**os.environ, "PYTHONSAFEPATH": "1"}, check=False).returncode


def _refuse_before_loading(folder: RunFolder, stage: str, options: Mapping[str, str]) -> None:
    """Problems that would otherwise show only after loading the model, which may take minutes."""
    from orchestrator.config.run import makes_classifier
    from orchestrator.run_state.frozen import load_config
    from orchestrator.run_state.held_out_rows import held_out_examples

    config = load_config(folder)
    unfit = [name for name in GENERATING if name in options]
    if makes_classifier(config, stage) and unfit:
        raise ConfigError(
            f"{unfit[0]}: {stage} makes a classifier, which predicts classes and generates no text; leave it out"
        )
    if options.get("--examples", "0") != "0":
        next(held_out_examples(config, folder, stage, 1), None)
    output = options.get("--output")
    if output is not None and not Path(output).expanduser().absolute().parent.is_dir():
        raise ConfigError(f"--output {output}: its folder does not exist")
