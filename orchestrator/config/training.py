"""The stages of a pipeline: types and ranges; no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.config.base import Fraction, NaturalFloat, NaturalInt, PositiveFloat, PositiveInt, Section, Text
from orchestrator.config.data import DataConfig
from orchestrator.config.functions import FunctionSource, MetricsConfig
from orchestrator.config.tuning import Tuning


class BatchConfig(Section):
    """How many sequences an optimizer step and a forward pass take."""

    global_size: PositiveInt
    """Sequences (packed rows where packing is on) per optimizer step, over all ranks. A preset's grows to what the ranks can share."""
    micro_size: PositiveInt
    """Sequences of one forward pass on one rank. A preset's shrinks to what divides a rank's share of `global_size`."""


class OptimizerConfig(Section):
    name: Literal["adamw", "adamw_8bit", "adamw_paged", "adamw_8bit_paged"]
    """bitsandbytes keeps states in 8 bits, or in pages that a GPU short of memory gives to the host (2305.14314), or both."""
    lr: PositiveFloat
    """Peak learning rate."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None
    """Rate of each layer as a share of the one above it; what stands highest of the trained has the whole rate, embeddings the
    least. ULMFiT (1801.06146, section 3.1) takes 1/2.6; null is one rate for all."""
    head_lr: PositiveFloat | None
    """Peak rate of what stands outside the layers: the head that a classifier or reward model gets anew, a pooler, the output
    head where it is not tied; whatever `layer_decay` says. Null is `lr`."""
    weight_decay: NaturalFloat
    """Decoupled; not applied to biases and to vectors such as norms."""
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
    """Share of the steps in which the rate rises linearly from 0, rounded up; slanted_triangular's cut_frac, rounded down."""
    decay_ratio: Fraction | None
    """Share of the steps in which the rate falls at the end (linear, cosine), rounded up; null falls from the warm-up's end."""
    final_ratio: Fraction
    """Rate at the last step as a share of the peak (linear, cosine); slanted_triangular begins there too: 1 / its ratio."""


class CheckpointConfig(Section):
    every_steps: PositiveInt | None
    """Optimizer steps between checkpoints; null saves at the end of the stage only."""
    keep_last: PositiveInt
    """Newest checkpoints kept."""
    keep_every: PositiveInt | None
    """Checkpoints at multiples of this step are kept for good; null keeps none beside the newest and the best."""
    keep_best: bool
    """Keep the checkpoint with the lowest held-out loss of those that were evaluated at their own step."""
    background: bool
    """Write beside training from a copy in host memory (as large as this rank's part of the checkpoint)."""
    rehearse: bool
    """Write, prove and remove a checkpoint after the very first step, so that a disk that refuses it is known at once."""
    retries: NaturalInt
    """How often a save that the disk refused is tried again."""
    retry_seconds: PositiveFloat
    """Pause before such a retry."""
    probe_rows: NaturalInt
    """Rows whose loss is stored, and must come out again after a resume before the first step; 0 stores none."""
    accept_changes: tuple[str, ...]
    """Keys, with all below them, that may have another value when the run goes on, though they change its result."""


class FaultConfig(Section):
    """What happens where a loss or a gradient is not finite, or spikes: the update is skipped on all ranks alike."""

    skips_before_rollback: PositiveInt
    """Skips in a row after which the run goes back to its last proven checkpoint and leaves out these steps' data."""
    max_skips: NaturalInt
    """Updates that may be skipped or left out in the whole stage; one more fails the run."""
    max_rollbacks: NaturalInt
    """Times that the stage may go back; a further need fails the run."""
    spike_sigma: PositiveFloat | None
    """A loss over mean + this many standard deviations of the last `spike_window` losses is a fault; null judges no height."""
    spike_window: Annotated[int, Field(ge=2)]
    """Good steps that make mean and deviation."""


class EarlyStoppingConfig(Section):
    """Training ends where evaluations on the way bring no more gain; the artifact is made of the best one's checkpoint."""

    metric: Text
    """A column of metrics.jsonl that evaluations write, such as `eval_loss`."""
    mode: Literal["min", "max"]
    """Which way is better."""
    patience: PositiveInt
    """Evaluations in a row without gain after which training ends."""
    # The section is null in conf/, so that its one key with an obvious value has its default here.
    min_delta: NaturalFloat = 0.0
    """A gain must be greater than this; 0 counts every gain."""


class TrainingStage(Section):
    """What every stage that trains has."""

    start_from: str | None
    """Earlier stage whose artifact is trained on; `auto` is the nearest one that makes a policy, null the base itself."""
    max_steps: PositiveInt | None
    """Optimizer steps, whatever `epochs` says; null leaves the length to `epochs`."""
    epochs: PositiveFloat | None
    """Passes over the rows. Typing one of the two takes the place of a preset's other; where both are typed, `max_steps` decides."""
    tuning: Tuning | None
    """Another tuning than the run's, for this stage alone; null is the run's. Only whole-model tunings (full, freeze) may differ."""
    batch: BatchConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    checkpoint: CheckpointConfig
    faults: FaultConfig
    data: DataConfig
    ledger: bool
    """Write the rows of every step to samples/, so that `audit` can prove that each row was taken exactly once an epoch."""
    metrics: MetricsConfig
    """Functions of your own, measured at every evaluation."""
    callbacks: tuple[FunctionSource, ...]
    """`function(event, values, ...)`, called on the first rank with every event and row of metrics; it may return "stop"."""
    log_every_steps: PositiveInt
    evaluate_every_steps: PositiveInt | None
    """Steps between evaluations; null evaluates before the first and after the last step only."""
    early_stopping: EarlyStoppingConfig | None
    """A checkpoint is saved at each new best, whatever `checkpoint.every_steps` says; null trains to the last step."""
    pause_at_step: PositiveInt | None
    """Evaluate, save and end after this step, as on a stop; with null the run goes on to the same result. Studies judge trials so."""


class SftStage(TrainingStage):
    """Supervised fine-tuning: next-token loss on the answers."""

    kind: Literal["sft"]
