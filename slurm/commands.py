"""How Slurm's client programs are called: one injectable seam, a clean environment, time limits; nothing of ours."""

import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# SBATCH_* variables override the #SBATCH lines of a script, and SQUEUE_FORMAT its columns.
_STEERING = re.compile(r"(SBATCH|SQUEUE|SACCT|SCANCEL|SCONTROL|SLURM|SRUN|SALLOC)_")
_KEPT = frozenset({"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS"})
_SECRET = re.compile(r"(API_?KEY|TOKEN|SECRET|PASSWORD|PASSWD|ACCESS_KEY|CREDENTIAL)", re.IGNORECASE)

_NO_ANSWER = re.compile(
    r"timed out|unable to contact|connection refused|connection reset|zero bytes|temporarily unavailable|"
    r"transport endpoint|communication|backup controller|not responding|connect failure",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Answer:
    """Output of a program; `exit_code` is None if it gave no answer in time."""

    exit_code: int | None
    output: str
    errors: str


Run = Callable[[Sequence[str], float], Answer]
"""argv, seconds -> Answer."""


class SlurmError(Exception):
    """Slurm refused, or cannot be queried; one sentence with its own message."""


class NoAnswerError(SlurmError):
    """The controller gave no answer in time: nothing is known, and nothing was refused."""


def run_command(argv: Sequence[str], seconds: float) -> Answer:
    """Run a client program of Slurm in a clean environment. Raises SlurmError if the program is missing."""
    try:
        done = subprocess.run(
            list(argv),
            env=clean_environment(os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Answer(None, "", f"{argv[0]} did not answer within {seconds:g} s")
    except FileNotFoundError as error:
        raise SlurmError(
            f"{argv[0]} is not on the PATH: run this where Slurm's commands are installed, or load its module."
        ) from error
    except OSError as error:
        raise SlurmError(f"{argv[0]} cannot be run: {error.strerror}.") from error
    return Answer(done.returncode, done.stdout, done.stderr)


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Without the variables that override #SBATCH lines and formats, and without secrets: accounting may store them."""
    return {
        name: value
        for name, value in environment.items()
        if (name in _KEPT or not _STEERING.match(name)) and not is_secret(name)
    }


def is_secret(name: str) -> bool:
    return _SECRET.search(name) is not None


def gave_no_answer(answer: Answer) -> bool:
    """The controller did not answer in time: nothing is known, and nothing was refused."""
    return answer.exit_code is None or (answer.exit_code != 0 and _NO_ANSWER.search(answer.errors) is not None)


def last_words(answer: Answer) -> str:
    """Slurm's own last line, without the name of the program before it."""
    lines = [line for line in (answer.errors or answer.output).splitlines() if line.strip()]
    return re.sub(r"^\w+: (error: )?", "", lines[-1]).strip() if lines else "no output"
