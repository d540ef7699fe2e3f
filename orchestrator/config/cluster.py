"""Where a run goes: cluster profile, launcher, tracking: types and ranges; no torch."""

from __future__ import annotations

from typing import Literal, cast

from pydantic import model_validator

from orchestrator.config.base import Fraction, NaturalFloat, NaturalInt, PositiveFloat, PositiveInt, Section, Text


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


class Achieved(Section):
    """Share of the peak that the executed operations reach, communication and dequantisation left out; null where unknown."""

    full: Fraction | None
    """When every weight gets a gradient."""
    lora: Fraction | None
    """With adapters on a frozen base."""
    qlora: Fraction | None
    """With adapters on a 4-bit base."""


class HardwareConfig(Section):
    """One device (a GPU, or the cores of one rank); null is unknown. The files of conf/hardware/ name the sources."""

    name: Text
    """Runs on hardware of the same name share what was measured."""
    peak_tflops: PositiveFloat | None
    """Dense bf16 peak in TFLOP/s."""
    native_bfloat16: bool | None
    """Whether it multiplies bfloat16 without emulation (GPUs of compute capability 8.0 or later): what `model.dtype=auto` goes
    by. Null asks the machine, where the ranks run on this one."""
    memory_gib: PositiveFloat | None
    """Memory in GiB."""
    memory_gbytes_per_second: PositiveFloat | None
    """Memory bandwidth."""
    link_gbytes_per_second: PositiveFloat | None
    """To the other devices of its node, one direction."""
    host_gbytes_per_second: PositiveFloat | None
    """To the host's memory, one direction: what offloading costs."""
    watts: PositiveFloat | None
    """Board power under load, without host and cooling."""
    dollars_per_hour: NaturalFloat | None
    """Price of one device; null leaves money out of the plan."""
    achieved: Achieved
    """What training makes of the peak."""

    @model_validator(mode="before")
    @classmethod
    def _of_older_files(cls, values: object) -> object:
        """Run folders and hardware files written before `native_bfloat16` lack it, and go on."""
        return {"native_bfloat16": None, **cast("dict[str, object]", values)} if isinstance(values, dict) else values


class ClusterConfig(Section):
    """A site: how many ranks, and what the scheduler wants to know."""

    nodes: PositiveInt
    processes_per_node: PositiveInt
    """Ranks of a node: one per GPU, or gloo ranks on a CPU machine."""
    device: Literal["auto", "cpu", "cuda"]
    """`auto` takes the GPU where there is one."""
    hardware: HardwareConfig
    """The device of a rank; `hardware@cluster.hardware=NAME` chooses another."""
    interconnect_gbytes_per_second: PositiveFloat | None
    """Between nodes: all network cards of a node together, one direction; null where there is one node."""
    communication_overlap: Fraction
    """Share of the compute time behind which communication can hide; an assumption of the forecast."""
    disk_gbytes_per_second: PositiveFloat
    """What one job writes to the disk of the run folder; a measured save takes its place in the forecast."""
    mean_time_to_failure_hours: PositiveFloat | None
    """Of one device, everything around it included; a job of n devices fails n times as often. Null: no failures."""
    restart_seconds: NaturalFloat
    """From a failure to the first step after it, the queue included."""
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
    node_memory_gib: PositiveFloat | None
    """Host memory of a node in GiB; null where unknown, and then what the host needs is shown and not judged."""
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
