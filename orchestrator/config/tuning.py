"""Types and ranges of the tuning methods. Must not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from orchestrator.config.base import Fraction, NaturalFloat, NaturalInt, PositiveFloat, PositiveInt
from orchestrator.config.tuning_method import TuningMethod


class FullTuning(TuningMethod):
    """Trains every parameter."""

    is_adapter: ClassVar[bool] = False
    trains_everything: ClassVar[bool] = True
    method: Literal["full"]


class FreezeTuning(TuningMethod):
    """Trains a part of the base's own parameters and freezes the rest; the switches add up."""

    is_adapter: ClassVar[bool] = False
    freezes_parts: ClassVar[bool] = True
    method: Literal["freeze"]
    layers: Annotated[str, Field(pattern=r"^(all|none|(first|last) [1-9][0-9]*)$")] | tuple[NaturalInt, ...]
    """Whole layers: `last N`, `first N`, `all`, `none`, or a list of their numbers from 0."""
    embeddings: bool
    """Train the input embeddings."""
    head: bool
    """Train the output head; if it is tied to the embeddings, both are one matrix and both are trained."""
    norms: bool
    """Train every norm of the model, including the last one and those in frozen layers."""
    also: tuple[str, ...]
    """Patterns (fnmatch) of further parameters' names, such as `*.self_attn.q_proj.*`."""
    unfreeze_every_steps: PositiveInt | None
    """Unfreeze one more level (head and last norm, layers from last to first, embeddings) every this many steps; null,
    with the next key also null, trains all from the first step."""
    unfreeze_every_epochs: PositiveFloat | None
    """The same in passes over the rows; 1 is ULMFiT's (1801.06146, section 3.3)."""

    @property
    def is_gradual(self) -> bool:
        return self.unfreeze_every_steps is not None or self.unfreeze_every_epochs is not None

    def problems(self, field: str) -> Iterator[str]:
        if None not in (self.unfreeze_every_steps, self.unfreeze_every_epochs):
            yield f"{field}: unfreeze_every_steps and unfreeze_every_epochs say the same thing twice; set one to null"


class LoraTuning(TuningMethod):
    """LoRA (2106.09685): h = W0 x + (alpha/r) B A x."""

    method: Literal["lora"]
    rank: PositiveInt
    alpha: PositiveFloat
    dropout: Fraction
    target_modules: Literal["all-linear"] | tuple[str, ...]
    """`all-linear` (every linear layer but the head) or a list of module names."""
    use_rslora: bool
    """Scale by alpha/sqrt(rank) instead of alpha/rank (2312.03732)."""
    use_dora: bool
    """DoRA: train magnitude and direction separately (2402.09353)."""
    init: Annotated[str, Field(pattern=r"^(default|loftq|pissa|pissa_niter_[1-9][0-9]*)$")]
    """`default`: A random, B 0. `pissa` (2404.02948): the base's principal part is trained, its residual is frozen;
    `pissa_niter_16` finds it by 16 steps of a randomised method. `loftq` (2310.08659): A and B compensate nf4's
    rounding."""
    lora_plus_ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None
    """Learning rate of B over that of A (LoRA+, 2402.12354); null is one rate for both."""

    @property
    def is_pissa(self) -> bool:
        return self.init.startswith("pissa")

    @property
    def is_loftq(self) -> bool:
        return self.init == "loftq"

    @property
    def uses_dora(self) -> bool:
        return self.use_dora

    @property
    def input_dropout(self) -> float:
        return self.dropout

    @property
    def b_rate_ratio(self) -> float | None:
        return self.lora_plus_ratio

    @property
    def named_modules(self) -> tuple[str, ...]:
        return _named(self.target_modules)


OpenFraction = Annotated[float, Field(gt=0, lt=1)]


class Ia3Tuning(TuningMethod):
    """IA3 (2205.05638): learned vectors, initialised to 1, that scale keys, values and the feed-forward's inner
    activations.
    """

    method: Literal["ia3"]
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of linear layers whose outputs are scaled."""
    feedforward_modules: tuple[str, ...]
    """Those of them whose inputs are scaled instead."""

    @property
    def named_modules(self) -> tuple[str, ...]:
        return self.target_modules


class PromptTuning(TuningMethod):
    """Prompt tuning (2104.08691): learned embeddings of virtual tokens prepended to every text."""

    method: Literal["prompt"]
    virtual_tokens: PositiveInt
    """Virtual tokens prepended to every text; they cost memory and time like real ones."""
    init: Literal["vocabulary", "random"]
    """`vocabulary` starts from the embeddings of randomly drawn tokens (the better one in the paper), `random` from
    noise."""

    @property
    def virtual_token_count(self) -> int:
        return self.virtual_tokens

    @property
    def virtual_inputs(self) -> int:
        return self.virtual_tokens


class PrefixTuning(TuningMethod):
    """Prefix tuning (2101.00190) without its reparametrisation: learned keys and values prepended to every text, in
    every layer.
    """

    method: Literal["prefix"]
    virtual_tokens: PositiveInt
    """Virtual tokens, in each layer."""

    @property
    def virtual_token_count(self) -> int:
        return self.virtual_tokens


class VeraTuning(TuningMethod):
    """VeRA (2310.11454): h = W0 x + diag(b) B diag(d) A x, with random, frozen A and B that all layers share."""

    method: Literal["vera"]
    rank: PositiveInt
    dropout: Fraction
    target_modules: Literal["all-linear"] | tuple[str, ...]
    """`all-linear` (every linear layer but the head) or a list of module names."""
    d_initial: PositiveFloat
    """Initial value of the vectors d; the vectors b start at 0."""
    projection_seed: NaturalInt
    """Seed of A and B, which the artifact does not contain."""

    @property
    def named_modules(self) -> tuple[str, ...]:
        return _named(self.target_modules)


class OftTuning(TuningMethod):
    """OFT (2306.07280) in its input-centric form (2506.19847): inputs of linear layers are rotated, block by block."""

    method: Literal["oft"]
    block_size: Annotated[int, Field(ge=2)]
    """Width of a block; must divide the input width of every layer that is tuned."""
    target_modules: Literal["all-linear"] | tuple[str, ...]
    """`all-linear` (every linear layer but the head) or a list of module names."""
    use_cayley_neumann: bool
    """Approximate the rotation by five terms of a series (fast; orthogonal while it is small); false solves for it
    exactly."""

    @property
    def named_modules(self) -> tuple[str, ...]:
        return _named(self.target_modules)


class AdaloraTuning(TuningMethod):
    """AdaLoRA (2303.10512): h = W0 x + (alpha / initial_rank) B diag(E) A x; ranks move to the layers that need them."""

    method: Literal["adalora"]
    rank: PositiveInt
    """Mean rank of a layer at the end."""
    initial_rank: PositiveInt
    """Initial rank of every layer; 1.5 times `rank` in the paper."""
    alpha: PositiveFloat
    dropout: Fraction
    target_modules: Literal["all-linear"] | tuple[str, ...]
    """`all-linear` (every linear layer but the head) or a list of module names."""
    first_share: Fraction
    """Share of the steps before ranks start to fall."""
    last_share: Fraction
    """Share of the steps at the end with fixed ranks."""
    allocate_every_steps: PositiveInt
    """Steps between two rank allocations."""
    beta1: OpenFraction
    """Smoothing factor (EMA) of a weight's importance."""
    beta2: OpenFraction
    """Smoothing factor (EMA) of its uncertainty."""
    orthogonal_weight: NaturalFloat
    """Weight of the penalty that keeps A and B orthogonal (gamma in equation 4)."""

    @property
    def named_modules(self) -> tuple[str, ...]:
        return _named(self.target_modules)


class LoreftTuning(TuningMethod):
    """ReFT (2404.03592): interventions on the hidden states of prompt tokens; the base's weights are frozen."""

    is_reft: ClassVar[bool] = True
    method: Literal["loreft"]
    variant: Literal["loreft", "direft"]
    """loreft: h + R^T (W h + b - R h), rows of R orthonormal (equation 3); direft: h + W2^T (W1 h + b) (equation 4)."""
    rank: PositiveInt
    layers: Literal["all"] | tuple[NaturalInt, ...]
    """Layers whose outputs are changed: `all`, or their numbers from 0."""
    first_positions: NaturalInt
    """Tokens at the start of a document's prompt that are changed."""
    last_positions: NaturalInt
    """Tokens at the end of a document's prompt that are changed."""
    share_weights: bool
    """First and last positions share one intervention in each layer; false trains one for each."""
    dropout: Fraction
    """Dropout on the output of an intervention."""


def _named(target_modules: str | tuple[str, ...]) -> tuple[str, ...]:
    return target_modules if isinstance(target_modules, tuple) else ()


ADAPTER_TUNINGS = (
    LoraTuning,
    Ia3Tuning,
    PromptTuning,
    PrefixTuning,
    VeraTuning,
    OftTuning,
    AdaloraTuning,
    LoreftTuning,
)
"""Methods that leave the base frozen: the artifact is an adapter."""
AdapterTuning = (
    LoraTuning | Ia3Tuning | PromptTuning | PrefixTuning | VeraTuning | OftTuning | AdaloraTuning | LoreftTuning
)
Tuning = Annotated[FullTuning | FreezeTuning | AdapterTuning, Field(discriminator="method")]
