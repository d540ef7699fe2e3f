"""Types and ranges of the cluster profile, its hardware and the launcher. Must not import torch."""

from __future__ import annotations

from typing import Literal, cast

from pydantic import model_validator

from orchestrator.config.base import Fraction, NaturalFloat, NaturalInt, PositiveFloat, PositiveInt, Section, Text


class PrepareJob(Section):
    """Resources of the Slurm job that prepares data; null takes the training job's value. It never requests GPUs."""

    partition: str | None
    """With a partition of its own, the job ignores the training job's `constraint`, `exclude` and `extra_sbatch`."""
    cpus_per_task: PositiveInt | None
    """One tokenising process per CPU."""
    memory: str | None
    """Such as 64G."""
    time_limit: str | None
    """Such as 04:00:00."""
    over_mib: NaturalInt
    """Data files larger than this many MiB, and hub data sets, are prepared by this job unless they are already
    prepared."""


class Achieved(Section):
    """Share of the peak that the executed operations reach, excluding communication and dequantisation; null if
    unknown.
    """

    full: Fraction | None
    """With gradients for every weight."""
    lora: Fraction | None
    """With adapters on a frozen base."""
    qlora: Fraction | None
    """With adapters on a 4-bit base."""


class HardwareConfig(Section):
    """One device (a GPU, or the cores of one rank); null is unknown. The files in conf/hardware/ cite their sources."""

    name: Text
    """Runs on hardware of the same name share their measurements."""
    peak_tflops: PositiveFloat | None
    """Dense bf16 peak in TFLOP/s."""
    native_bfloat16: bool | None
    """Whether it multiplies bfloat16 without emulation (GPUs of compute capability 8.0 or later): it decides
    `model.dtype=auto`. Null probes this machine if the ranks run on it."""
    memory_gib: PositiveFloat | None
    """Memory in GiB."""
    memory_gbytes_per_second: PositiveFloat | None
    """Memory bandwidth."""
    link_gbytes_per_second: PositiveFloat | None
    """To the other devices of its node, one direction."""
    host_gbytes_per_second: PositiveFloat | None
    """To the host's memory, one direction; it bounds offloading."""
    watts: PositiveFloat | None
    """Board power under load, excluding host and cooling."""
    dollars_per_hour: NaturalFloat | None
    """Price of one device; null omits costs from the plan."""
    achieved: Achieved
    """Share of the peak that training reaches."""

    @model_validator(mode="before")
    @classmethod
    def _of_older_files(cls, values: object) -> object:
        """Run folders and hardware files from before `native_bfloat16` existed lack it and stay valid."""
        return {"native_bfloat16": None, **cast("dict[str, object]", values)} if isinstance(values, dict) else values


class ClusterConfig(Section):
    """A site: its ranks, its hardware and its scheduler options."""

    nodes: PositiveInt
    processes_per_node: PositiveInt
    """Ranks per node: one per GPU, or gloo ranks on a CPU machine."""
    device: Literal["auto", "cpu", "cuda"]
    """`auto` takes the GPU if there is one."""
    hardware: HardwareConfig
    """The device of a rank; `hardware@cluster.hardware=NAME` chooses another."""
    interconnect_gbytes_per_second: PositiveFloat | None
    """Between nodes: all network cards of a node together, one direction; null for a single node."""
    communication_overlap: Fraction
    """Share of the compute time that communication can overlap with; an assumption of the forecast."""
    disk_gbytes_per_second: PositiveFloat
    """Write rate of one job to the run folder's disk; the forecast prefers a measured save."""
    mean_time_to_failure_hours: PositiveFloat | None
    """Mean time between failures of one device with its share of the node and network; n devices fail n times as often.
    Null: no failures."""
    restart_seconds: NaturalFloat
    """From a failure to the first step after it, including the queue."""
    interface: str | None
    """Network interface for NCCL and gloo; null lets them choose."""
    environment: dict[str, str]
    """Environment variables of the job; no secrets."""
    setup_lines: tuple[str, ...]
    """Shell lines before the job, such as `module load cuda`."""
    container_command: tuple[str, ...]
    """Arguments put in front of the task's own command."""
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    gpu_request: Literal["gpus-per-node", "gres", "none"]
    """How GPUs are requested; sites differ."""
    gpus_per_node: NaturalInt
    gpu_type: str | None
    cpus_per_task: PositiveInt | None
    node_memory_gib: PositiveFloat | None
    """Host memory of a node in GiB; null if unknown: the host's need is then shown but not checked."""
    memory: str | None
    """Host memory of a node in Slurm's notation, such as 480G; `0` is all of it."""
    time_limit: str | None
    """In Slurm's notation, such as 12:00:00."""
    exclude: tuple[str, ...]
    """Nodes to exclude."""
    extra_sbatch: tuple[str, ...]
    """Further sbatch options, each as `--option=value`."""
    requeue: bool
    """Whether the site allows requeueing; otherwise a successor job is chained."""
    stop_lead_seconds: PositiveInt
    """How long before the time limit the job is asked to save."""
    scratch: str | None
    """Folder for caches, shared by all nodes; null is the user's cache folder."""
    prepare: PrepareJob
    """The GPU-less Slurm job that prepares data."""


class LauncherConfig(Section):
    """What starts the ranks."""

    kind: Literal["local", "torchrun", "slurm"]
    """`local` starts the ranks itself, `torchrun` through a torchrun script, `slurm` through sbatch."""
    python: str | None
    """Interpreter on the nodes; null is the one that runs the command."""
    array: bool
    """Under Slurm: whether the runs of a multirun (-m) become one job array per stage, or one job each."""
    array_max_running: PositiveInt | None
    """Tasks of an array that may run at the same time; null sets no limit."""
    max_preemptions: NaturalInt
    """Preemptions and lost nodes that do not count as failures."""
    max_failures: NaturalInt
    """Failures after which the stage is abandoned."""
