"""A Slurm job script as text: header lines validated and quoted, the template filled; pure, imports nothing of ours."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slurm.template import fill

Template = Literal["template.sbatch", "task.sbatch"]
"""The ranks of a stage with attempts, stop requests and successors; or one plain process."""
_WORD = re.compile(r"[A-Za-z0-9_.:=,&|*\[\]()@+%/-]+\Z")
_MEMORY = re.compile(r"[0-9]+[KMGT]?\Z")
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d{1,2}))?(?::(?P<third>\d{1,2}))?\Z")
_OPTION = re.compile(r"--(?P<key>[a-z][a-z0-9-]*)(?:=(?P<value>.*))?\Z")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_SIGNAL_SLACK_SECONDS = 60
"""Slurm may send the lead-time signal this much earlier than asked."""

_OURS = (
    *(
        "job-name",
        "nodes",
        "ntasks",
        "ntasks-per-node",
        "cpus-per-task",
        "gpus-per-node",
        "gpus",
        "gres",
        "mem",
        "time",
    ),
    *("partition", "account", "qos", "constraint", "exclude", "requeue", "no-requeue", "open-mode", "signal", "output"),
    *("error", "chdir", "array", "dependency", "parsable", "wrap", "export", "comment", "kill-on-invalid-dep"),
)


class InvalidJobError(ValueError):
    """Header values that Slurm would misread: one sentence a problem."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """Contents of the #SBATCH lines; every value as Slurm is to see it, unquoted."""

    name: str
    output: str
    """Log of the batch shell: a path; %j and its kind are Slurm's, %% is a percent sign."""
    working_directory: str
    nodes: int
    cpus_per_task: int
    memory: str
    time_limit: str
    gpu_request: Literal["gpus-per-node", "gres", "none"]
    gpus_per_node: int
    gpu_type: str | None
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    exclude: tuple[str, ...]
    requeue: bool
    stop_lead_seconds: int
    extra: tuple[str, ...]
    array: str | None = None


def render(header: Header, *, body: Mapping[str, str], template: Template = "template.sbatch") -> str:
    """The whole script: the template with the header and the body's values. Raises InvalidJobError."""
    text = Path(__file__).with_name(template).read_text(encoding="utf-8")
    return fill(text, {"header": render_header(header), **body})


def render_header(header: Header) -> str:
    """The #SBATCH lines, one option each. Raises InvalidJobError with every problem."""
    problems = find_problems(header)
    if problems:
        raise InvalidJobError("\n".join(problems))
    options = {
        "job-name": header.name,
        "output": header.output,
        # Otherwise a requeue truncates the log.
        "open-mode": "append",
        # Always absolute: with a missing one, Slurm runs in the temporary folder and ends with 0.
        "chdir": header.working_directory,
        "nodes": str(header.nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(header.cpus_per_task),
        # Without it some sites give the whole node's memory, others a tiny default.
        "mem": header.memory,
        "time": header.time_limit,
        # B: only the batch shell gets it, and passes it on as the stop file; torchrun would be killed by it.
        "signal": f"B:USR2@{header.stop_lead_seconds}",
        "partition": header.partition,
        "account": header.account,
        "qos": header.qos,
        "constraint": header.constraint,
        "exclude": ",".join(header.exclude) or None,
        "array": header.array,
    }
    lines = [f"--{key}={quote(value)}" for key, value in options.items() if value is not None]
    lines += [*_gpu_lines(header), "--requeue" if header.requeue else "--no-requeue", *header.extra]
    return "\n".join(f"#SBATCH {line}" for line in lines)


def find_problems(header: Header) -> list[str]:
    """Every value of the header that Slurm would misread, refuse too late, or silently accept."""
    return [
        *_text_problems(header),
        *_word_problems(header),
        *_time_problems(header),
        *_gpu_problems(header),
        *_extra_problems(header.extra),
    ]


def parse_time_limit(text: str) -> int | None:
    """Seconds of minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S; None for anything else."""
    match = _TIME.match(text)
    if match is None:
        return None
    parts = [int(part) for part in (match["first"], match["second"], match["third"]) if part is not None]
    if match["days"] is not None:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return ((int(match["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(parts) == 3:
        return (parts[0] * 60 + parts[1]) * 60 + parts[2]
    return parts[0] * 60 + (parts[1] if len(parts) == 2 else 0)


def quote(value: str) -> str:
    """A value for a #SBATCH line: bare if plain, else in double quotes as sbatch's own reader takes them."""
    if _WORD.match(value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _gpu_lines(header: Header) -> list[str]:
    if header.gpu_request == "none" or header.gpus_per_node == 0:
        return []
    # One of the two options, never both, which Slurm mixes up; --gpus=4 might be split 3+1 between nodes.
    amount = f"{header.gpu_type}:{header.gpus_per_node}" if header.gpu_type else str(header.gpus_per_node)
    return [f"--gpus-per-node={amount}" if header.gpu_request == "gpus-per-node" else f"--gres=gpu:{amount}"]


def _text_problems(header: Header) -> list[str]:
    problems: list[str] = []
    # With a slash in the job name, as with a missing log folder, a job fails with 0:53 and leaves no log.
    if not header.name or "/" in header.name or _CONTROL.search(header.name):
        problems.append(
            f"The job name is {header.name!r}: slashes and newlines are not allowed; the log would be lost."
        )
    for field, path in {"output": header.output, "working_directory": header.working_directory}.items():
        if not path.startswith("/") or "\\" in path or _CONTROL.search(path):
            problems.append(f"{field} is {path!r}: an absolute path without newlines or backslashes is required.")
    return problems


def _word_problems(header: Header) -> list[str]:
    words = {
        "partition": header.partition,
        "account": header.account,
        "qos": header.qos,
        "constraint": header.constraint,
        "gpu_type": header.gpu_type,
        "array": header.array,
    }
    words |= {f"exclude[{index}]": node for index, node in enumerate(header.exclude)}
    problems = [
        f"cluster.{field} is {word!r}: letters, digits and _.:=,&|*[]()@+%/- are allowed."
        for field, word in words.items()
        if word is not None and not _WORD.match(word)
    ]
    if not _MEMORY.match(header.memory):
        problems.append(
            f"cluster.memory is {header.memory!r}: give a number with K, M, G or T, or 0 for the whole node."
        )
    counts = {"nodes": header.nodes, "cpus_per_task": header.cpus_per_task}
    problems += [f"cluster.{field} is {count}: 1 or more is needed." for field, count in counts.items() if count < 1]
    return problems


def _time_problems(header: Header) -> list[str]:
    limit = parse_time_limit(header.time_limit)
    if not limit:
        return [
            f"cluster.time_limit is {header.time_limit!r}: give minutes, H:MM:SS or D-HH:MM:SS, for example 24:00:00."
        ]
    lead = header.stop_lead_seconds
    if lead < 1 or lead + _SIGNAL_SLACK_SECONDS >= limit:
        sentence = (
            f"cluster.stop_lead_seconds is {lead} and time_limit is {limit} s: Slurm may signal "
            f"{_SIGNAL_SLACK_SECONDS} s earlier, so {lead} + {_SIGNAL_SLACK_SECONDS} must be below {limit} "
            f"and the lead at least 1."
        )
        return [sentence]
    return []


def _gpu_problems(header: Header) -> list[str]:
    if header.gpu_request == "none" and header.gpus_per_node > 0:
        return [f"cluster.gpus_per_node is {header.gpus_per_node} but gpu_request is none: set gpus-per-node or gres."]
    if header.gpu_request != "none" and header.gpus_per_node < 1:
        return [
            f"cluster.gpu_request is {header.gpu_request} but gpus_per_node is {header.gpus_per_node}: give 1 or more."
        ]
    return []


def _extra_problems(extra: tuple[str, ...]) -> list[str]:
    problems: list[str] = []
    for line in extra:
        match = _OPTION.match(line)
        if match is None or _CONTROL.search(line):
            problems.append(f"cluster.extra_sbatch has {line!r}: one option per line, like --reservation=NAME.")
        elif match["key"] in _OURS:
            problems.append(
                f"cluster.extra_sbatch has --{match['key']}: the script sets it from another key; use that one."
            )
        elif match["value"] is not None and not _WORD.match(match["value"]) and not _is_quoted(match["value"]):
            problems.append(f"cluster.extra_sbatch has {line!r}: put the value in double quotes.")
    return problems


def _is_quoted(value: str) -> bool:
    return re.fullmatch(r'"(?:[^"\\]|\\.)*"', value) is not None
