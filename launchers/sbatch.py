"""JobSpec -> Slurm job script, alone or as an array; pure."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace

from launchers.shell import common_values, describe_size, read_part
from launchers.spec import ClusterSettings, InvalidValueError, JobSpec, Script, check
from launchers.torchrun import is_direct
from slurm.job import Header, InvalidJobError, Template, find_problems, render_header
from slurm.job import render as render_job


def render(spec: JobSpec) -> Script:
    """The .sbatch script of one stage. Raises InvalidValueError with every problem."""
    check(spec)
    cluster = spec.cluster
    values = common_values(spec)
    body = values | {
        # srun of Slurm 22.05 to 23.02 does not read --cpus-per-task of the header
        "exports": f"{values['exports']}\nexport SRUN_CPUS_PER_TASK={cluster.cpus_per_task}",
        "title": f"Stage {spec.stage} of {spec.name}: {describe_size(spec)} under Slurm.",
        "start": read_part("start_direct.bash" if is_direct(spec) else "start_torchrun.bash"),
        "secrets_file": shlex.quote(spec.secrets_file or ""),
        "max_preemptions": str(cluster.max_preemptions),
        "max_failures": str(cluster.max_failures),
    }
    return Script(path=spec.script_path, text=_render_job(spec, body, "template.sbatch"))


def render_task(spec: JobSpec) -> Script:
    """The .sbatch script of one process without ranks and attempts: the command runs once. Raises InvalidValueError."""
    check(spec)
    names = ("name", "command", "container", "working_directory", "script_path", "exports", "setup")
    values = common_values(spec)
    body = {name: values[name] for name in names} | {
        "title": f"{spec.stage} of {spec.name}: one process under Slurm.",
        "secrets_file": shlex.quote(spec.secrets_file or ""),
    }
    return Script(path=spec.script_path, text=_render_job(spec, body, "task.sbatch"))


def _render_job(spec: JobSpec, body: Mapping[str, str], template: Template) -> str:
    try:
        return render_job(make_header(spec), body=body, template=template)
    except InvalidJobError as error:
        raise InvalidValueError(str(error)) from error


def render_array(
    specs: Sequence[JobSpec], *, name: str, path: str, log_directory: str, max_running: int | None = None
) -> Script:
    """One job array over single-stage runs of the same size: task i runs the i-th run's own script."""
    # In an array %j would differ from the ids that users see; %A_%a is theirs.
    output = f"{log_directory.replace('%', '%%')}/slurm-%A_%a.log"
    shared = [replace(make_header(spec), name=name, output=output, working_directory="/") for spec in specs]
    for spec, header in zip(specs, shared, strict=True):
        if header != shared[0]:
            raise InvalidValueError(
                f"{spec.name} requests other resources than {specs[0].name}: all runs of an array must request the same."
            )
    limit = "" if max_running is None else f"%{max_running}"
    header = replace(shared[0], array=f"0-{len(specs) - 1}{limit}")
    problems = find_problems(header)
    if problems:
        raise InvalidValueError("\n".join(problems))
    scripts = "\n".join(f"  {shlex.quote(spec.script_path)}" for spec in specs)
    text = f"""#!/usr/bin/env bash
{render_header(header)}
set -uo pipefail

scripts=(
{scripts}
)
exec bash "${{scripts[SLURM_ARRAY_TASK_ID]}}"
"""
    return Script(path=path, text=text)


def make_header(spec: JobSpec) -> Header:
    """The #SBATCH facts of a job; what has no value although Slurm needs one is refused."""
    cluster = spec.cluster
    # No default: without --mem some sites give the whole node's memory, others almost nothing.
    if cluster.cpus_per_task is None or cluster.memory is None or cluster.time_limit is None:
        raise InvalidValueError("\n".join(_missing(cluster)))
    return Header(
        name=spec.name,
        output=f"{spec.log_directory.replace('%', '%%')}/slurm-%j.log",
        working_directory=spec.working_directory,
        nodes=spec.nodes,
        cpus_per_task=cluster.cpus_per_task,
        memory=cluster.memory,
        time_limit=cluster.time_limit,
        gpu_request=cluster.gpu_request,
        gpus_per_node=cluster.gpus_per_node,
        gpu_type=cluster.gpu_type,
        partition=cluster.partition,
        account=cluster.account,
        qos=cluster.qos,
        constraint=cluster.constraint,
        exclude=cluster.exclude,
        requeue=cluster.requeue,
        stop_lead_seconds=cluster.stop_lead_seconds,
        extra=cluster.extra_sbatch,
    )


def _missing(cluster: ClusterSettings) -> list[str]:
    needed = {"cpus_per_task": cluster.cpus_per_task, "memory": cluster.memory, "time_limit": cluster.time_limit}
    return [
        f"cluster.{field} is not set: launcher=slurm requires it, because the defaults of sites differ."
        for field, value in needed.items()
        if value is None
    ]
