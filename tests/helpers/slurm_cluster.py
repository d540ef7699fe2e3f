"""The cluster under test and the actions of a user at its terminal."""

import os
import random
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launchers import sbatch
from launchers.process import descendants
from launchers.spec import JobSpec
from launchers.submission import Stage, submit
from slurm.query import query

MINICLUSTER = Path(__file__).parents[1] / "slurm" / "minicluster.sh"
OPTIONS = (
    *("--nodes", "3", "--gpus", "2", "--timeout", "60"),
    *("--conf", "PreemptType=preempt/partition_prio", "--conf", "PreemptMode=REQUEUE"),
    *("--conf", "PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=30 OverSubscribe=FORCE:1"),
    *("--conf", "PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF"),
)


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    folder: Path

    def manage(self, *arguments: str) -> None:
        subprocess.run(["bash", MINICLUSTER, *arguments[:1], self.folder, *arguments[1:]], check=True, timeout=120)

    def start(self) -> None:
        """Job ids begin anywhere: clusters of other workers share this loopback, and ports and rendezvous follow the id."""
        self.manage("start", *OPTIONS, "--conf", f"FirstJobId={random.randrange(1_000, 60_000)}")

    def signal_node(self, node: str, number: int) -> None:
        """Freeze (SIGSTOP) or thaw (SIGCONT) every process of a virtual node."""
        root = int((self.folder / "run" / f"{node}.pid").read_text().split()[0])
        for process in descendants(root):
            with suppress(ProcessLookupError):
                os.kill(process, number)

    def controller(self) -> int:
        return int((self.folder / "run" / "slurmctld.pid").read_text().split()[0])

    def submit(self, spec: JobSpec, **options: str) -> str:
        token = f"{Path(spec.working_directory).parent.name}.{time.time_ns()}".replace("[", "").replace("]", "")
        return submit(Stage(spec, sbatch.render(spec), token), **options)

    def state(self, job_id: str) -> str:
        return query([job_id])[job_id].state.name

    def wait(self, job_id: str, *, seconds: float = 60, wanted: str | None = None) -> str:
        """The final state of the job (or `wanted`, as soon as it is reached)."""
        deadline = time.monotonic() + seconds
        while True:
            state = query([job_id])[job_id].state
            if state.name == wanted or (wanted is None and state.phase == "ended"):
                return state.name
            assert time.monotonic() < deadline, f"job {job_id} is {state.name} after {seconds} s\n{run('squeue')}"
            time.sleep(0.3)


def run(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
