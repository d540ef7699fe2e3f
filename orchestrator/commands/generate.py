"""The verbs that use what a run made: generate, export, report. Must not import torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from orchestrator.config.classification import CLASSIFIER_KINDS
from orchestrator.errors import EXIT_DONE, ConfigError
from orchestrator.run_folder.folder import MANIFEST, RunFolder
from orchestrator.run_state.freeze import check_writable

FOREGROUND = "orchestrator.metrics.foreground"


GENERATING = ("--max-new-tokens", "--system", "--temperature", "--top-p", "--seed", "--output")
"""Options of `generate` that mean nothing to a classifier."""


def generate(folder: RunFolder, *, stage: str | None, options: Mapping[str, str]) -> int:
    """Answers of the tuned model next to those of its base; a classifier's classes. `options` go to the process that generates."""
    stage = _stage_of(folder, stage, "make a policy or a classifier", CLASSIFIER_KINDS)
    if not folder.stage(stage).result.exists():
        raise ConfigError(f"{stage} is not done: there is no {folder.stage(stage).result}; see `status {folder.root}`")
    _refuse_before_loading(folder, stage, options)
    words = [f"{name}={value}" for name, value in options.items()]  # joined: a value may begin with a dash
    argv = [sys.executable, "-m", FOREGROUND, "evaluation.compare_with_base", str(folder.run), "--stage", stage, *words]
    return subprocess.run(argv, env={**os.environ, "PYTHONSAFEPATH": "1"}, check=False).returncode


def _refuse_before_loading(folder: RunFolder, stage: str, options: Mapping[str, str]) -> None:
    """What would only be found out after the model was loaded, which may take minutes."""
    from orchestrator.config.run import makes_classifier
    from orchestrator.run_state.frozen import load_config
    from orchestrator.run_state.held_out_rows import held_out_examples

    config = load_config(folder)
    unfit = [name for name in GENERATING if name in options]
    if makes_classifier(config, stage) and unfit:
        raise ConfigError(
            f"{unfit[0]}: {stage} makes a classifier, which gives classes and generates no text; leave it out"
        )
    if options.get("--examples", "0") != "0":
        next(held_out_examples(config, folder, stage, 1), None)
    output = options.get("--output")
    if output is not None and not Path(output).expanduser().absolute().parent.is_dir():
        raise ConfigError(f"--output {output}: its folder is not there")


def export(folder: RunFolder, *, stage: str | None, to: str | None, max_kl: float | None) -> int:
    """A folder that can be published: adapter merged, measured, with a card, opened again."""
    stage = _stage_of(folder, stage, "make a policy", ())
    if not folder.stage(stage).result.exists():
        raise ConfigError(f"{stage} is not done: there is no {folder.stage(stage).result}; see `status {folder.root}`")
    _refuse_what_cannot_be_merged(folder, stage)
    target = Path(to or folder.root / "export").expanduser().resolve()
    if target.exists() and not (target / MANIFEST).is_file() and any(target.iterdir()):
        raise ConfigError(f"--to {target}: it is there and was not made by export; give a new folder")
    check_writable(target, advice="type --to FOLDER with a folder of yours")
    words = [] if max_kl is None else ["--max-kl", str(max_kl)]
    argv = [
        sys.executable,
        "-m",
        FOREGROUND,
        "merging.export",
        str(folder.run),
        "--stage",
        stage,
        "--to",
        str(target),
        *words,
    ]
    return subprocess.run(argv, env={**os.environ, "PYTHONSAFEPATH": "1"}, check=False).returncode


def _refuse_what_cannot_be_merged(folder: RunFolder, stage: str) -> None:
    from orchestrator.config.tuning import ADAPTER_TUNINGS
    from orchestrator.config.tuning_rules import why_no_merge
    from orchestrator.run_state.frozen import load_config

    tuning = load_config(folder).tuning
    reason = why_no_merge(tuning) if isinstance(tuning, ADAPTER_TUNINGS) else None
    if reason is not None:
        raise ConfigError(f"export: {reason}; publish the folder {folder.stage(stage).artifact} itself")


def _stage_of(folder: RunFolder, chosen: str | None, what: str, more: tuple[str, ...]) -> str:
    """The stage asked for, or the last one that makes a policy; `more` kinds are allowed too, `what` says it in words."""
    from orchestrator.config.run import POLICY_KINDS, made_kind
    from orchestrator.run_state.frozen import load_config, warn_newer

    config = load_config(folder)
    warn_newer(folder)  # after it: what cannot be read at all is one error and no warning
    kinds = (*POLICY_KINDS, *more)
    policies = [name for name in config.pipeline if made_kind(config, name) in kinds]
    stage = chosen or (policies[-1] if policies else "")
    if stage not in policies:
        given = f"--stage {stage}" if stage else str(folder.root)
        raise ConfigError(f"{given}: the stages that {what} are {', '.join(policies) or 'none'}")
    return stage


def report(folder: Path) -> int:
    """What a study has found so far, from its folder; writes the files of its report."""
    from orchestrator.studies.report import write_report
    from orchestrator.studies.trials import StudyFolder

    print(write_report(StudyFolder(folder)))
    return EXIT_DONE
