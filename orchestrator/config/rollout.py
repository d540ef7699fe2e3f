"""How completions are generated, and what scores them. Must not import torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.config.base import NaturalFloat, NaturalInt, PositiveInt, Section, Text
from orchestrator.config.functions import FunctionSource

STAGE_PREFIX = "stage:"
"""Prefix of the name of a stage of the same run, where other values are possible too."""
MODEL_PREFIX = "model:"
"""Prefix of a folder with a reward model."""


class RewardSource(FunctionSource):
    """One reward of a policy stage."""

    source: Text
    """`stage:NAME` (a reward stage before it), `model:FOLDER` (a sequence-classification folder with one label), a
    built-in function, or `FILE.py:function`."""
    weight: float
    """Weight of this reward in the sum of all rewards."""

    @property
    def is_model(self) -> bool:
        """Whether a model gives the reward, which then needs memory of its own."""
        return self.source.startswith((STAGE_PREFIX, MODEL_PREFIX))


class RolloutConfig(Section):
    """How completions are generated."""

    prompts: PositiveInt
    """Prompts of a rollout, over all ranks."""
    group_size: PositiveInt
    """Completions of each prompt."""
    passes: PositiveInt
    """Passes over each rollout; one pass is prompts x group_size / batch.global_size optimizer steps."""
    max_new_tokens: PositiveInt
    """Longest completion, in tokens."""
    temperature: NaturalFloat
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)]
    """Nucleus sampling: the smallest set of tokens with this total probability; 1 keeps all."""
    top_k: NaturalInt
    """Sample from this many of the likeliest tokens; 0 keeps all."""
    generate_size: PositiveInt
    """Completions that one rank generates at a time."""
    engine: Literal["batch", "continuous"]
    """`batch` waits for the longest of a batch; `continuous` (transformers' continuous batching) refills freed slots
    immediately."""

    @property
    def greedy(self) -> RolloutConfig:
        """The same with the likeliest token at every position."""
        return self.model_copy(update={"temperature": 0.0})
