"""Types and ranges shared by the stages that train, and of SFT. Must not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from orchestrator.config.base import Fraction, NaturalFloat, NaturalInt, PositiveFloat, PositiveInt, Section, Text
from orchestrator.config.data import DataConfig
from orchestrator.config.functions import FunctionSource, MetricsConfig
from orchestrator.config.stage import Product, RowKind, StageSettings
from orchestrator.config.tuning import Tuning


class BatchConfig(Section):
    """Sequences per optimizer step and per forward pass."""

    global_size: PositiveInt
    """Sequences (packed ones with packing) per optimizer step, over all ranks. A preset's value is raised to what the
    ranks can share."""
    micro_size: PositiveInt
    """Sequences per forward pass on one rank. A preset's value is lowered to a divisor of a rank's share of
    `global_size`."""


class OptimizerConfig(Section):
    name: Literal["adamw", "adamw_8bit", "adamw_paged", "adamw_8bit_paged"]
    """bitsandbytes keeps states in 8 bits, in pages that move to the host when GPU memory runs short (2305.14314), or
    both."""
    lr: PositiveFloat
    """Peak learning rate."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None
    """Learning rate of each layer as a share of the one above it; the topmost trained layer has the full rate,
    embeddings the lowest. ULMFiT (1801.06146, section 3.1) takes 1/2.6; null is one rate for all."""
    head_lr: PositiveFloat | None
    """Peak learning rate outside the layers: a classifier's or reward model's new head, a pooler, an untied output
    head; independent of `layer_decay`. Null is `lr`."""
    weight_decay: NaturalFloat
    """Decoupled; not applied to biases or to vectors such as norms."""
    beta1: Fraction
    beta2: Fraction
    epsilon: PositiveFloat
    max_grad_norm: PositiveFloat | None
    """Clip the global gradient norm to this; null does not clip."""

    @property
    def has_8bit_states(self) -> bool:
        return self.name in ("adamw_8bit", "adamw_8bit_paged")


class ScheduleConfig(Section):
    name: Literal["linear", "cosine", "constant", "slanted_triangular"]
    warmup_ratio: Fraction
    """Share of the steps with a linear rise of the learning rate from 0, rounded up; slanted_triangular's cut_frac,
    rounded down."""
    decay_ratio: Fraction | None
    """Share of the steps at the end with a falling learning rate (linear, cosine), rounded up; null starts at the
    warm-up's end."""
    final_ratio: Fraction
    """Learning rate at the last step as a share of the peak (linear, cosine); slanted_triangular also starts there: 1 /
    its ratio."""


class CheckpointConfig(Section):
    every_steps: PositiveInt | None
    """Optimizer steps between checkpoints; null saves only at the end of the stage."""
    keep_last: PositiveInt
    """How many of the newest checkpoints are kept."""
    keep_every: PositiveInt | None
    """Checkpoints at multiples of this step are kept permanently; null keeps only the newest and the best."""
    keep_best: bool
    """Keep the checkpoint with the lowest held-out loss of those that were evaluated at their own step."""
    background: bool
    """Write in the background from a copy in host memory (as large as this rank's part of the checkpoint)."""
    rehearse: bool
    """Write, verify and remove a checkpoint after the very first step, so that an unwritable disk shows immediately."""
    retries: NaturalInt
    """Retries of a save that the disk refused."""
    retry_seconds: PositiveFloat
    """Pause before such a retry."""
    probe_rows: NaturalInt
    """Rows whose loss is stored and must be reproduced after a resume, before its first step; 0 stores none."""
    accept_changes: tuple[str, ...]
    """Keys (with all keys below them) that may change when the run resumes, although they affect the result."""


class FaultConfig(Section):
    """Handling of non-finite or spiking losses and gradients: the update is skipped on all ranks."""

    skips_before_rollback: PositiveInt
    """Consecutive skips after which the run rolls back to its last verified checkpoint and omits these steps' data."""
    max_skips: NaturalInt
    """Updates that may be skipped or omitted in the whole stage; one more fails the run."""
    max_rollbacks: NaturalInt
    """Rollbacks that the stage may make; one more fails the run."""
    spike_sigma: PositiveFloat | None
    """A loss over mean + this many standard deviations of the last `spike_window` losses is a fault; null disables
    spike detection."""
    spike_window: Annotated[int, Field(ge=2)]
    """Good steps over which mean and deviation are computed."""


class EarlyStoppingConfig(Section):
    """Ends training when evaluations stop improving; the artifact is built from the best checkpoint."""

    metric: Text
    """A column of metrics.jsonl that evaluations write, such as `eval_loss`."""
    mode: Literal["min", "max"]
    """Which way is better."""
    patience: PositiveInt
    """Consecutive evaluations without improvement after which training ends."""
    # The section is null in conf/, so the one key with an obvious value has its default here.
    min_delta: NaturalFloat = 0.0
    """Smallest improvement that counts; 0 counts every one."""


class TrainingStage(StageSettings):
    """Common settings of stages that train."""

    trains: ClassVar[bool] = True
    sums_logprobs: ClassVar[bool] = False
    """Whether the loss is only a sum of log-probabilities, which is what Liger's kernel computes."""
    compares_rows: ClassVar[bool] = False
    """Whether the loss compares the rows of a micro-batch, whose size then decides the result."""
    start_from: str | None
    """Earlier stage whose artifact is trained on; `auto` is the nearest one that yields a policy, null the base
    itself."""
    max_steps: PositiveInt | None
    """Optimizer steps, overriding `epochs`; null leaves the length to `epochs`."""
    epochs: PositiveFloat | None
    """Passes over the rows. Setting one of the two replaces a preset's value of the other; if both are set, `max_steps`
    decides."""
    tuning: Tuning | None
    """Tuning of this stage only; null is the run's. Only whole-model tunings (full, freeze) may differ."""
    batch: BatchConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    checkpoint: CheckpointConfig
    faults: FaultConfig
    data: DataConfig
    ledger: bool
    """Write the rows of every step to samples/, so that `audit` can prove that each row was used exactly once per
    epoch."""
    metrics: MetricsConfig
    """Your own functions, evaluated at every evaluation."""
    callbacks: tuple[FunctionSource, ...]
    """`function(event, values, ...)`, called on the first rank with every event and row of metrics; it may return "stop"."""
    log_every_steps: PositiveInt
    evaluate_every_steps: PositiveInt | None
    """Steps between evaluations; null evaluates before the first and after the last step only."""
    early_stopping: EarlyStoppingConfig | None
    """A checkpoint is saved at each new best, whatever `checkpoint.every_steps` says; null trains to the last step."""
    pause_at_step: PositiveInt | None
    """Evaluate, save and end after this step, as on a stop; resuming with null gives the same result. Studies compare
    trials this way."""

    @property
    def user_functions(self) -> Mapping[str, tuple[FunctionSource, ...]]:
        return {"metrics.functions": self.metrics.functions, "callbacks": self.callbacks}

    @property
    def scores_reference_first(self) -> bool:
        """Whether the reference policy scores every row once before the first step."""
        return False

    @property
    def holds_reference(self) -> bool:
        """Whether a reference policy is kept next to the trained one."""
        return False


class SftStage(TrainingStage):
    """Supervised fine-tuning: next-token loss on the answers."""

    kind: Literal["sft"]
    makes: ClassVar[Product | None] = "policy"
    row_kind: ClassVar[RowKind | None] = "text"
    sums_logprobs: ClassVar[bool] = True
