"""The exceptions that users see, and the exit codes. Must not import torch or anything heavy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

EXIT_DONE = 0
EXIT_DEFECT = 1
EXIT_USER = 2
EXIT_LAUNCH_FAILED = 3
EXIT_SAVED = 75
EXIT_WRITTEN = 76
"""The rank has done its work up to the proof, which a fresh process in its place goes on with."""
EXIT_INTERRUPTED = 130
"""Ctrl-C with nothing to save, by the shell's convention for signals."""
EXIT_DO_NOT_RESTART = 93


class OrchestratorError(Exception):
    """A fault reported in sentences, without a traceback. `exit_code` is that of the process."""

    exit_code = EXIT_USER

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class ConfigError(OrchestratorError):
    """The configuration is invalid."""


class DataError(OrchestratorError):
    """The data cannot be trained on; every problem names file, line and field."""


class ModelError(OrchestratorError):
    """The base model cannot be found, read or used."""


class RunFolderError(OrchestratorError):
    """The run folder cannot be used: another configuration, no permission, no space."""


class LaunchFailed(OrchestratorError):
    """The job could not be started, or ended without a result."""

    exit_code = EXIT_LAUNCH_FAILED


class TrainingFailed(OrchestratorError):
    """Training reached an invalid state that a restart would not fix."""

    exit_code = EXIT_DO_NOT_RESTART


class CheckpointError(OrchestratorError):
    """A checkpoint or an artifact failed its verification."""

    exit_code = EXIT_DO_NOT_RESTART


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate closest to `name`, or None where nothing is close."""
    matches = get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return matches[0] if matches else None
