"""Where a run goes: cluster profile, launcher, tracking: types and ranges; no torch."""

from __future__ import annotations

from typing import Literal

from orchestrator.config.base import NaturalInt, PositiveFloat, PositiveInt, Section


class PrepareJob(Section):
    """What the Slurm job that prepares data asks for; null takes the training job's value. It never asks for GPUs."""

    partition: str | None
    """With a partition of its own, the job leaves `constraint`, `exclude` and `extra_sbatch` to the training job."""
    cpus_per_task: PositiveInt | None
    """One tokenising process a CPU."""
    memory: str | None
    """Such as 64G."""
    time_limit: str | None
    """Such as 04:00:00."""
    over_mib: NaturalInt
    """Data files of more MiB than this, and hub data sets, are prepared by such a job where they are not prepared yet."""


class ClusterConfig(Section):
    """A site: how many ranks, and what the scheduler wants to know."""

    nodes: PositiveInt
    processes_per_node: PositiveInt
    """Ranks of a node: one per GPU, or gloo ranks on a CPU machine."""
    device: Literal["auto", "cpu", "cuda"]
    """`auto` takes the GPU where there is one."""
    peak_tflops: PositiveFloat | None
    """Dense bf16 peak of one device in TFLOP/s, for MFU; null where unknown."""
    memory_gib: PositiveFloat | None
    """Memory of one device in GiB; null where unknown."""
    interface: str | None
    """Network interface for NCCL and gloo; null leaves the choice to them."""
    environment: dict[str, str]
    """Variables of the job, without secrets."""
    setup_lines: tuple[str, ...]
    """Shell lines before the job, such as `module load cuda`."""
    container_command: tuple[str, ...]
    """Words put before the task's own command."""
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    gpu_request: Literal["gpus-per-node", "gres", "none"]
    """How GPUs are asked for; sites differ."""
    gpus_per_node: NaturalInt
    gpu_type: str | None
    cpus_per_task: PositiveInt | None
    memory: str | None
    """Host memory of a node in Slurm's words, such as 480G; `0` is all of it."""
    time_limit: str | None
    """Slurm's words, such as 12:00:00."""
    exclude: tuple[str, ...]
    """Nodes never to be used."""
    extra_sbatch: tuple[str, ...]
    """Further sbatch options, each as `--option=value`."""
    requeue: bool
    """Whether the site lets a job be requeued; otherwise a successor is chained."""
    stop_lead_seconds: PositiveInt
    """How long before the time limit the job is asked to save."""
    scratch: str | None
    """Folder that all nodes share, for caches; null is the user's cache folder."""
    prepare: PrepareJob
    """The Slurm job without GPUs that prepares data."""


class LauncherConfig(Section):
    """What starts the ranks."""

    kind: Literal["local", "torchrun", "slurm"]
    """`local` starts the ranks itself, `torchrun` through a torchrun script, `slurm` through sbatch."""
    python: str | None
    """Interpreter on the nodes; null is the one that plans."""
    array: bool
    """Under Slurm: whether the runs of a multirun (-m) become one job array a stage, or a job each."""
    array_max_running: PositiveInt | None
    """Tasks of an array that may run at the same time; null lets Slurm start all that fit."""
    max_preemptions: NaturalInt
    """Preemptions and lost nodes that cost nothing."""
    max_failures: NaturalInt
    """Failures after which the stage is given up."""


class WandbTracking(Section):
    """Weights & Biases."""

    kind: Literal["wandb"]
    project: str
    entity: str | None
    mode: Literal["auto", "online", "offline"]
    """`auto` is online where there is a key, else offline."""
    finish_timeout_seconds: PositiveFloat
    """How long the end of a stage waits for W&B."""
    init_timeout_seconds: PositiveFloat
    """How long the server may take to answer at the start; training does not wait for it."""


class NoTracking(Section):
    """metrics.jsonl alone."""

    kind: Literal["none"]
