"""Time of the launchers' pure work: `python benchmarks/launch.py`. No torch, no Slurm; prints one line a figure."""

import statistics
import sys
import time
from collections.abc import Callable, Sequence

from launchers import local, sbatch, torchrun
from launchers.spec import ClusterSettings, JobSpec
from slurm.commands import Answer
from slurm.query import query

NODES = 4096
JOBS = 10_000
REPEATS = 50


def make_spec(*, nodes: int) -> JobSpec:
    stage = "/runs/demo/sft"
    return JobSpec(
        name="demo-sft",
        stage="sft",
        command=(sys.executable, "-m", "orchestrator.worker", "/runs/demo/run.json", "--stage", "sft"),
        decide=(sys.executable, "-m", "orchestrator.run_state.attempts", "/runs/demo", "sft"),
        working_directory="/runs/demo",
        script_path="/runs/demo/scripts/sft.sbatch",
        stage_directory=stage,
        attempts_directory=f"{stage}/attempts",
        result_file=f"{stage}/result.json",
        stop_file=f"{stage}/STOP",
        log_directory=f"{stage}/logs",
        nodes=nodes,
        processes_per_node=8,
        python=sys.executable,
        cluster=ClusterSettings(
            cpus_per_task=96,
            memory="0",
            time_limit="24:00:00",
            gpus_per_node=8,
            gpu_request="gpus-per-node",
            exclude=tuple(f"node{number}" for number in range(200)),
        ),
    )


def measure(work: Callable[[], object]) -> tuple[float, float]:
    """Median and worst time in milliseconds."""
    times: list[float] = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        work()
        times.append((time.perf_counter() - begin) * 1000)
    return statistics.median(times), max(times)


def main() -> None:
    rows = "".join(f"{job}|{job}|RUNNING|None|1:00|10:00|N/A|n1\n" for job in range(1_000_000, 1_000_000 + JOBS))
    job_ids = [str(job) for job in range(1_000_000, 1_000_000 + JOBS)]
    calls: list[str] = []

    def recorded(argv: Sequence[str], _seconds: float) -> Answer:
        calls.append(argv[0])
        return Answer(0, rows, "")

    many = make_spec(nodes=NODES)
    figures = {
        f"render slurm, {NODES} nodes": lambda: sbatch.render(many),
        f"render torchrun, {NODES} nodes": lambda: torchrun.render(many),
        "render local": lambda: local.render(make_spec(nodes=1)),
        f"query {JOBS} jobs, one squeue call": lambda: query(job_ids, run=recorded),
    }
    for name, work in figures.items():
        median, worst = measure(work)
        print(f"{name:40} median {median:8.2f} ms   worst {worst:8.2f} ms")
    assert set(calls) == {"squeue"} and len(calls) == REPEATS


if __name__ == "__main__":
    main()
