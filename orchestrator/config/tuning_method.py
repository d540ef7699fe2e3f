"""What a tuning method says of itself. Must not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from orchestrator.config.base import Section


class TuningMethod(Section):
    """Base of every method. A method overrides what differs, so that other code asks it and not its class."""

    is_adapter: ClassVar[bool] = True
    """Whether the base stays frozen and something small is trained with it: the artifact is an adapter."""
    trains_everything: ClassVar[bool] = False
    """Whether every parameter of the base is trained."""
    freezes_parts: ClassVar[bool] = False
    """Whether it trains a part of the base's own parameters, and the artifact holds the frozen rest too."""
    is_reft: ClassVar[bool] = False
    """Whether it changes hidden states by modules of ours; PEFT knows neither them nor their files."""

    @property
    def is_gradual(self) -> bool:
        """Whether parameters are unfrozen step by step."""
        return False

    @property
    def is_pissa(self) -> bool:
        """Whether training begins from the base's principal part, so that the frozen base is a residual."""
        return False

    @property
    def is_loftq(self) -> bool:
        """Whether A and B begin with what nf4's rounding lost."""
        return False

    @property
    def uses_dora(self) -> bool:
        """Whether magnitude and direction are trained separately."""
        return False

    @property
    def input_dropout(self) -> float:
        """Dropout on the input of every adapted linear layer, which training keeps for the backward pass."""
        return 0.0

    @property
    def b_rate_ratio(self) -> float | None:
        """Learning rate of LoRA's B over that of A; None is one rate for both."""
        return None

    @property
    def virtual_token_count(self) -> int:
        """Virtual tokens prepended to every text."""
        return 0

    @property
    def virtual_inputs(self) -> int:
        """Those of them that pass through the model like real ones."""
        return 0

    @property
    def named_modules(self) -> tuple[str, ...]:
        """Modules of the base that are adapted by name."""
        return ()

    def problems(self, field: str) -> Iterator[str]:
        """A sentence for every broken rule across its own keys; `field` is its key."""
        del field
        yield from ()
