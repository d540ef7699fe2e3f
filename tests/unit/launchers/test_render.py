"""The scripts as text: pure, byte-stable, accepted by bash and shellcheck; bad values are refused."""

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace

import pytest
from launching import make_pure_spec

from launchers import local, sbatch, torchrun
from launchers.spec import ClusterSettings, InvalidValueError, JobSpec, Script

H100 = ClusterSettings(
    partition="gpu",
    account="team_a",
    constraint="h100&ib",
    gpus_per_node=8,
    gpu_request="gpus-per-node",
    gpu_type="h100",
    cpus_per_task=96,
    memory="0",
    time_limit="1-00:00:00",
    setup_lines=("module purge", "module load cuda/12.8"),
    container_command=("apptainer", "exec", "--nv", "/images/train image.sif"),
    interface="ib0",
    exclude=("node07", "node[11-12]"),
    extra_sbatch=("--reservation=spring", "--exclusive"),
    stop_lead_seconds=300,
    scratch="/scratch/team a",
)


def golden_spec(**changes: object) -> JobSpec:
    run = "/runs/demo"
    values: dict[str, object] = {
        "command": ("/opt/venv/bin/python", "-m", "orchestrator.worker", f"{run}/run.json", "--stage", "sft"),
        "decide": ("/opt/venv/bin/python", "-m", "orchestrator", "decide", run, "--stage", "sft"),
        "python": "/opt/venv/bin/python",
        "environment": {"HF_HUB_OFFLINE": "1", "GREETING": "it's $HOME"},
    }
    return make_pure_spec(run, **(values | changes))


def slurm_spec(num_nodes: int, **changes: object) -> JobSpec:
    size = {"nodes": num_nodes, "processes_per_node": 8, "cluster": H100}
    return golden_spec(**({"script_path": "/runs/demo/scripts/sft.sbatch"} | size | changes))


GOLDEN: dict[str, Callable[[], Script]] = {
    "torchrun.1x2.sh": lambda: torchrun.render(golden_spec()),
    "torchrun.2x8.sh": lambda: torchrun.render(golden_spec(nodes=2, processes_per_node=8)),
    "torchrun.direct.sh": lambda: torchrun.render(golden_spec(processes_per_node=1, single_process_direct=True)),
    "torchrun.launch_all.sh": lambda: torchrun.render_launch_all(golden_spec(nodes=2, processes_per_node=8)),
    "local.1x2.sh": lambda: local.render(golden_spec()),
    "slurm.1.sbatch": lambda: sbatch.render(slurm_spec(1)),
    "slurm.8.sbatch": lambda: sbatch.render(slurm_spec(8)),
    "slurm.512.sbatch": lambda: sbatch.render(slurm_spec(512)),
    "slurm.task.sbatch": lambda: sbatch.render_task(
        slurm_spec(
            1,
            name="demo-prepare",
            stage="prepare",
            cluster=replace(H100, gpus_per_node=0, gpu_request="none", gpu_type=None, memory="64G", cpus_per_task=16),
            secrets_file="/home/u ser/.cache/keys.sh",
        )
    ),
    "slurm.array.sbatch": lambda: sbatch.render_array(
        [slurm_spec(1, script_path=f"/runs/demo {n}/sft.sbatch") for n in range(3)],
        name="sweep",
        path="/runs/sweep.sbatch",
        log_directory="/runs/sweep logs",
        max_running=2,
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_scripts_are_the_golden_ones(name: str, golden: Callable[[str, str], None]) -> None:
    script = GOLDEN[name]()
    assert script == GOLDEN[name](), "the same input gives the same bytes"
    golden(name, script.text)


@pytest.mark.parametrize("name", GOLDEN)
def test_bash_and_shellcheck_accept_the_scripts(name: str) -> None:
    text = GOLDEN[name]().text.encode()
    subprocess.run(["bash", "-n"], input=text, check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    found = subprocess.run(["shellcheck", "-"], input=text, capture_output=True, check=False)
    assert found.returncode == 0, found.stdout.decode()


def test_slurm_scripts_differ_only_in_their_size() -> None:
    one, many = (sbatch.render(slurm_spec(nodes)).text.splitlines() for nodes in (8, 512))
    assert len(one) == len(many)
    changed = [(a, b) for a, b in zip(one, many, strict=True) if a != b]
    assert [b for _, b in changed] == [
        "#SBATCH --nodes=512",
        "# Stage sft of demo-sft: 512 node(s) x 8 process(es) under Slurm.",
        "nodes=512",
    ]


REFUSED: list[tuple[dict[str, object], str]] = [
    ({"name": "a/b"}, "name is 'a/b'"),
    ({"name": "a\nb"}, r"name is 'a\\nb'"),
    ({"name": ""}, "name is ''"),
    ({"name": " x"}, "leading or trailing blanks"),
    ({"name": "x" * 200}, "at most 150 bytes"),
    ({"log_directory": "logs"}, "absolute path"),
    ({"log_directory": "/a\nb"}, "absolute path"),
    ({"stop_file": "/a\\b"}, "backslashes"),
    ({"environment": {"A B": "1"}}, "a variable's name may hold"),
    ({"environment": {"A": "a\0b"}}, "NUL"),
    ({"environment": {"RANK": "1"}}, "the launcher sets it"),
    ({"nodes": 0}, "nodes is 0"),
    ({"command": ()}, "command is empty"),
    ({"command": ("a\0b",)}, "NUL"),
    ({"cluster": replace(H100, setup_lines=("a\nb",))}, "each entry must be one shell line"),
]

REFUSED_BY_SLURM: list[tuple[dict[str, object], str]] = [
    ({"partition": "gpu batch"}, "cluster.partition is 'gpu batch'"),
    ({"account": "a#b"}, "cluster.account"),
    ({"qos": "a\nb"}, "cluster.qos"),
    ({"constraint": "$(id)"}, "cluster.constraint"),
    ({"exclude": ("node 1",)}, r"cluster.exclude\[0\]"),
    ({"gpu_type": "h 100"}, "cluster.gpu_type"),
    ({"memory": "12 GB"}, "cluster.memory"),
    ({"memory": None}, "cluster.memory is not set"),
    ({"cpus_per_task": 0}, "cluster.cpus_per_task is 0"),
    ({"cpus_per_task": None, "time_limit": None}, "cpus_per_task is not set.*\n.*time_limit is not set"),
    ({"time_limit": "tomorrow"}, "cluster.time_limit is 'tomorrow'"),
    ({"time_limit": "5:00", "stop_lead_seconds": 240}, "240 \\+ 60 must be below 300"),
    ({"gpu_request": "none"}, "gpu_request is none"),
    ({"gpus_per_node": 0}, "gpus_per_node is 0"),
    ({"extra_sbatch": ("reservation=x",)}, "like --reservation=NAME"),
    ({"extra_sbatch": ("--signal=USR1",)}, "another key"),
    ({"extra_sbatch": ("--x=1\n#SBATCH --y",)}, "one option per line"),
    ({"extra_sbatch": ("--mail-user=a b",)}, "double quotes"),
]


@pytest.mark.parametrize(("changes", "sentence"), REFUSED)
def test_values_that_no_script_may_hold_are_refused(changes: dict[str, object], sentence: str) -> None:
    for render in (torchrun.render, local.render, sbatch.render):
        with pytest.raises(InvalidValueError, match=sentence):
            render(slurm_spec(1, **changes))


@pytest.mark.parametrize(("changes", "sentence"), REFUSED_BY_SLURM)
def test_header_values_that_slurm_would_misread_are_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(InvalidValueError, match=sentence):
        sbatch.render(slurm_spec(1, cluster=replace(H100, **changes)))  # type: ignore[arg-type]


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(InvalidValueError) as caught:
        torchrun.render(golden_spec(name="a/b", nodes=0, log_directory="logs"))
    assert len(str(caught.value).splitlines()) == 3


def test_local_refuses_more_than_one_node() -> None:
    with pytest.raises(InvalidValueError, match="nodes is 2"):
        local.render(golden_spec(nodes=2))


def test_an_array_refuses_jobs_of_different_sizes() -> None:
    with pytest.raises(InvalidValueError, match="other resources"):
        sbatch.render_array([slurm_spec(1), slurm_spec(2)], name="x", path="/runs/x.sbatch", log_directory="/runs")
