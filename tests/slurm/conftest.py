"""A real Slurm of three virtual nodes for the whole test session; skipped only where Slurm cannot run."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launchers import sbatch
from launchers.spec import JobSpec
from launchers.submission import Stage, submit
from slurm.query import query

MINICLUSTER = Path(__file__).with_name("minicluster.sh")
OPTIONS = (
    *("--nodes", "3", "--gpus", "2", "--timeout", "60"),
    *("--conf", "PreemptType=preempt/partition_prio", "--conf", "PreemptMode=REQUEUE"),
    *("--conf", "PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=30 OverSubscribe=FORCE:1"),
    *("--conf", "PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF"),
)


@dataclass(frozen=True)
class Cluster:
    """The running cluster and what a person at its terminal would do."""

    folder: Path

    def manage(self, *arguments: str) -> None:
        subprocess.run(["bash", MINICLUSTER, *arguments[:1], self.folder, *arguments[1:]], check=True, timeout=120)

    def start(self) -> None:
        self.manage("start", *OPTIONS)

    def controller(self) -> int:
        return int((self.folder / "run" / "slurmctld.pid").read_text().split()[0])

    def submit(self, spec: JobSpec, **options: str) -> str:
        token = f"{Path(spec.working_directory).parent.name}.{time.time_ns()}".replace("[", "").replace("]", "")
        return submit(Stage(spec, sbatch.render(spec), token), **options)

    def state(self, job_id: str) -> str:
        return query([job_id])[job_id].state.name

    def wait(self, job_id: str, *, seconds: float = 60, wanted: str | None = None) -> str:
        """The state in which the job ended (or `wanted`, as soon as it is in it)."""
        deadline = time.monotonic() + seconds
        while True:
            state = query([job_id])[job_id].state
            if state.name == wanted or (wanted is None and state.phase == "ended"):
                return state.name
            assert time.monotonic() < deadline, f"job {job_id} is {state.name} after {seconds} s\n{run('squeue')}"
            time.sleep(0.3)


def run(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[Cluster]:
    if os.geteuid() != 0:
        pytest.skip("a cluster of virtual nodes needs root (munge, namespaces, device nodes)")
    if shutil.which("slurmctld") is None and shutil.which("apt-get") is None:
        pytest.skip("Slurm is not installed, and there is no apt-get to install it with")
    installed = subprocess.run(["bash", MINICLUSTER, "install"], capture_output=True, text=True, check=False)
    if installed.returncode != 0:
        pytest.skip(f"Slurm's packages cannot be installed here: {installed.stderr.strip().splitlines()[-1:]}")
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="mc-", dir="/tmp")))  # a short path: unix sockets
    before = os.environ.get("SLURM_CONF")
    cluster.start()
    os.environ["SLURM_CONF"] = str(cluster.folder / "etc" / "slurm.conf")
    yield cluster
    cluster.manage("stop")
    shutil.rmtree(cluster.folder, ignore_errors=True)
    if before is None:
        del os.environ["SLURM_CONF"]
    else:
        os.environ["SLURM_CONF"] = before


@pytest.fixture
def cluster(running_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with every node up and nothing in the queue, before and after."""
    yield running_cluster
    subprocess.run(["scancel", "--user=root"], check=False, timeout=60)
    deadline = time.monotonic() + 60
    while run("squeue", "--noheader") and time.monotonic() < deadline:
        time.sleep(0.3)
