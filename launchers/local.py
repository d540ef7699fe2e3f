"""Ranks on this machine without torchrun: the same script with another way of starting; never imports torch."""

from launchers.spec import InvalidValueError, JobSpec, Script, check
from launchers.torchrun import is_direct, render_script


def render(spec: JobSpec) -> Script:
    """The script that starts the ranks on this machine. Raises InvalidValueError, also for more than one node."""
    check(spec)
    if spec.nodes != 1:
        raise InvalidValueError(
            f"cluster.nodes is {spec.nodes}: launcher=local starts one node; use launcher=torchrun or launcher=slurm."
        )
    part = "start_direct.bash" if is_direct(spec) else "start_local.bash"
    return render_script(spec, part=part, title="on this machine", usage="bash SCRIPT")
