"""torchrun as a script for one or many nodes: JobSpec -> Script, pure; never imports torch."""

import shlex

from launchers.shell import common_values, describe_size, port_seed, read_part
from launchers.spec import JobSpec, Script, check
from slurm.template import fill


def render(spec: JobSpec) -> Script:
    """The script that starts torchrun on one node; run it on every node with its rank. Raises InvalidValueError."""
    check(spec)
    if is_direct(spec):
        return render_script(spec, part="start_direct.bash", title="as a single process", usage="bash SCRIPT")
    many = "on every node: bash SCRIPT NODE_RANK [HEAD_HOST[:PORT]]   (or NODE_RANK and HEAD_HOST in the environment)"
    usage = "bash SCRIPT" if spec.nodes == 1 else many
    return render_script(spec, part="start_torchrun.bash", title="under torchrun", usage=usage)


def is_direct(spec: JobSpec) -> bool:
    return spec.single_process_direct and spec.nodes == 1 and spec.processes_per_node == 1


def render_script(spec: JobSpec, *, part: str, title: str, usage: str) -> Script:
    """The common script around one way of starting the ranks (`part`); the spec was checked."""
    values = common_values(spec) | {
        "title": f"Stage {spec.stage} of {spec.name}: {describe_size(spec)} {title}.",
        "usage": usage.replace("SCRIPT", shlex.quote(spec.script_path)),
        "port_seed": str(port_seed(spec)),
        "start": read_part(part),
    }
    return Script(path=spec.script_path, text=fill(read_part("template.sh") + "\n", values))


def render_launch_all(spec: JobSpec) -> Script:
    """A helper that starts every node of the job over ssh: `bash launch_all.sh HOST ...`, node 0 first."""
    check(spec)
    values = {
        "nodes": str(spec.nodes),
        "script_path": shlex.quote(spec.script_path),
        "stop_file": shlex.quote(spec.stop_file),
    }
    path = spec.script_path.rpartition("/")[0] + f"/{spec.stage}.launch_all.sh"
    return Script(path=path, text=fill(read_part("launch_all.sh") + "\n", values))
