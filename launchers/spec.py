"""The job description that a launcher gets, and the script it renders; imports nothing of ours and never torch."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

GpuRequest = Literal["gpus-per-node", "gres", "none"]

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_RESERVED = frozenset({"PYTHONSAFEPATH", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "RANK", "LOCAL_RANK", "WORLD_SIZE"})


class LaunchError(Exception):
    """The job could not be started or followed; one sentence for the user."""


class InvalidValueError(LaunchError, ValueError):
    """A value that a script cannot contain: what was given and what is allowed, one sentence per problem."""


@dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    """The site's facts. None, "" and () mean "not set"; every real default is in conf/cluster."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus_per_node: int = 0
    gpu_request: GpuRequest = "none"
    gpu_type: str | None = None
    cpus_per_task: int | None = None
    """CPUs of one Slurm task: there is one task per node, so all ranks of the node share them."""
    memory: str | None = None
    """Memory of one node, for example 480G; 0 asks for the whole node."""
    time_limit: str | None = None
    """Slurm's form: minutes, H:MM:SS or D-HH:MM:SS."""
    setup_lines: tuple[str, ...] = ()
    """Shell lines of the site (module load ...), used verbatim."""
    container_command: tuple[str, ...] = ()
    """Argv put in front of the task only, for example (apptainer, exec, --nv, image.sif)."""
    interface: str | None = None
    """Name of the network interface for gloo and NCCL."""
    exclude: tuple[str, ...] = ()
    extra_sbatch: tuple[str, ...] = ()
    """More options for the header, each beginning with two dashes."""
    requeue: bool = True
    stop_lead_seconds: int = 120
    """How long before the time limit the ranks are asked to save."""
    scratch: str | None = None
    """Folder on storage that every node shares; it must exist on the node; exported as ORCHESTRATOR_SCRATCH."""
    max_preemptions: int = 100
    max_failures: int = 3


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """One stage as a job: the argv of one rank, where its files are, how many ranks, on what site."""

    name: str
    stage: str
    command: tuple[str, ...]
    """Argv of one rank without distributed facts; the script appends `--attempt K`."""
    decide: tuple[str, ...]
    """Argv that closes an attempt; the script appends `--attempt K --exit-code N` and reads its last line."""
    working_directory: str
    script_path: str
    stage_directory: str
    attempts_directory: str
    result_file: str
    stop_file: str
    log_directory: str
    nodes: int
    processes_per_node: int
    python: str
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    single_process_direct: bool = False
    """One process needs no torchrun: run the command itself."""
    secrets_file: str | None = None
    """Shell file (mode 0600) that a Slurm job reads for keys and tokens; never part of the script."""


@dataclass(frozen=True)
class Script:
    """A file to write: nothing was written yet."""

    path: str
    text: str
    mode: int = 0o755


def check(spec: JobSpec) -> None:
    """Raise InvalidValueError with every value that a script must not contain."""
    problems = [
        *_name_problems("name", spec.name),
        *_name_problems("stage", spec.stage),
        *_path_problems(spec),
        *_environment_problems(spec.environment),
        *_count_problems(spec),
        *_argv_problems(spec),
        *_setup_problems(spec.cluster.setup_lines),
    ]
    if problems:
        raise InvalidValueError("\n".join(problems))


def write(script: Script) -> Path:
    """Write the script atomically with its mode; an existing identical script is left alone."""
    path = Path(script.path)
    content = script.text.encode("utf-8", "surrogateescape")
    if path.is_file() and path.read_bytes() == content:
        path.chmod(script.mode)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.chmod(script.mode)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return path


def _name_problems(field_name: str, value: str) -> list[str]:
    if not value or value.strip() != value or value in {".", ".."}:
        return [f"{field_name} is {value!r}: give a name without leading or trailing blanks."]
    if "/" in value or "\\" in value or _CONTROL.search(value):
        return [f"{field_name} is {value!r}: slashes, newlines and control characters are not allowed."]
    if len(value.encode("utf-8", "surrogateescape")) > 150:
        return [f"{field_name} has {len(value)} characters: at most 150 bytes are allowed."]
    return []


def _path_problems(spec: JobSpec) -> list[str]:
    paths = {
        "working_directory": spec.working_directory,
        "script_path": spec.script_path,
        "stage_directory": spec.stage_directory,
        "attempts_directory": spec.attempts_directory,
        "result_file": spec.result_file,
        "stop_file": spec.stop_file,
        "log_directory": spec.log_directory,
        "python": spec.python,
        "cluster.scratch": spec.cluster.scratch or "/",
        "secrets_file": spec.secrets_file or "/",
    }
    return [
        f"{name} is {path!r}: an absolute path without newlines or backslashes is required."
        for name, path in paths.items()
        if not path.startswith("/") or "\\" in path or _CONTROL.search(path)
    ]


def _environment_problems(environment: Mapping[str, str]) -> list[str]:
    problems: list[str] = []
    for name, value in environment.items():
        if not _VARIABLE.match(name):
            problems.append(f"environment has {name!r}: a variable's name may hold letters, digits and _.")
        elif name in _RESERVED:
            problems.append(f"environment sets {name}: the launcher sets it itself; remove it.")
        elif "\0" in value:
            problems.append(f"environment {name} holds a NUL character, which no variable can hold.")
    return problems


def _count_problems(spec: JobSpec) -> list[str]:
    counts = {"nodes": spec.nodes, "processes_per_node": spec.processes_per_node}
    return [f"{name} is {count}: an integer of at least 1 is required." for name, count in counts.items() if count < 1]


def _argv_problems(spec: JobSpec) -> list[str]:
    argvs = {"command": spec.command, "decide": spec.decide}
    problems = [f"{name} is empty: give a program and its arguments." for name, argv in argvs.items() if not argv]
    argvs["cluster.container_command"] = spec.cluster.container_command
    return problems + [
        f"{name} holds {word!r}: a NUL character cannot be passed to a program."
        for name, argv in argvs.items()
        for word in argv
        if "\0" in word
    ]


def _setup_problems(lines: tuple[str, ...]) -> list[str]:
    return [
        f"cluster.setup_lines holds {line!r}: each entry must be one shell line, without newlines."
        for line in lines
        if "\n" in line or "\r" in line or "\0" in line
    ]
