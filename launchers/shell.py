"""The parts shared by all scripts, as shell text: quoted values, exports, the site's setup; pure."""

import shlex
import zlib
from pathlib import Path

from launchers.spec import ClusterSettings, JobSpec

_HERE = Path(__file__).parent


def read_part(name: str) -> str:
    """A shell file that ships with this module, without the final line feed."""
    return (_HERE / name).read_text(encoding="utf-8").rstrip("\n")


def describe_size(spec: JobSpec) -> str:
    return f"{spec.nodes} node(s) x {spec.processes_per_node} process(es)"


def common_values(spec: JobSpec) -> dict[str, str]:
    """Template values common to all launchers."""
    return {
        "name": shlex.quote(spec.name),
        "nodes": str(spec.nodes),
        "processes_per_node": str(spec.processes_per_node),
        "python": shlex.quote(spec.python),
        "command": shlex.join(spec.command),
        "decide": shlex.join(spec.decide),
        "container": shlex.join(spec.cluster.container_command),
        "working_directory": shlex.quote(spec.working_directory),
        "script_path": shlex.quote(spec.script_path),
        "attempts_directory": shlex.quote(spec.attempts_directory),
        "log_directory": shlex.quote(spec.log_directory),
        "result_file": shlex.quote(spec.result_file),
        "stop_file": shlex.quote(spec.stop_file),
        "functions": read_part("functions.bash"),
        "exports": _exports(spec),
        "setup": _setup(spec.cluster),
    }


def port_seed(spec: JobSpec) -> int:
    """First port to try, different for each stage of each run."""
    # Two jobs at one c10d endpoint silently share a store, so each stage starts from a port of its own.
    return zlib.crc32(spec.stage_directory.encode("utf-8", "surrogateescape")) % 100_000


def _exports(spec: JobSpec) -> str:
    settings = {
        **{name: spec.environment[name] for name in sorted(spec.environment)},
        # A module in the working folder must not shadow an installed package.
        "PYTHONSAFEPATH": "1",
        # torchrun's restarts over gloo: 4 of 11 succeeded without this variable, 7 of 7 with it.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    if spec.cluster.interface is not None:
        settings["GLOO_SOCKET_IFNAME"] = settings["NCCL_SOCKET_IFNAME"] = spec.cluster.interface
    lines = [f"export {name}={shlex.quote(value)}" for name, value in settings.items()]
    lines.append('export PYTHONUNBUFFERED="${PYTHONUNBUFFERED-1}"')
    if spec.processes_per_node > 1:
        # torchrun's own default for several processes is one thread each.
        lines.append(f'export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{_threads(spec)}}}"')
    return "\n".join(lines)


def _threads(spec: JobSpec) -> str:
    """Threads of one rank: its share of the CPUs of the node."""
    if spec.cluster.cpus_per_task is not None:
        return str(max(1, spec.cluster.cpus_per_task // spec.processes_per_node))
    ranks = spec.processes_per_node
    return f"$((($(getconf _NPROCESSORS_ONLN) + {ranks - 1}) / {ranks}))"


def _setup(cluster: ClusterSettings) -> str:
    lines: list[str] = []
    if cluster.setup_lines:  # the site's own lines may read variables that are not set
        lines += ["set +u", *cluster.setup_lines, "set -u"]
    if cluster.scratch is not None:
        lines.append(f"export ORCHESTRATOR_SCRATCH={shlex.quote(cluster.scratch)}")
        lines.append('[[ -d $ORCHESTRATOR_SCRATCH ]] || fail "the scratch folder $ORCHESTRATOR_SCRATCH is not there"')
    return "\n".join(lines)
