"""Token sampling with separate noise for each sequence, hence independent of the batch. Must not know generators.

N sequences, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from orchestrator.config.rollout import RolloutConfig


class SeededDraws:
    """Owns one random generator per sequence. Each sequence must get its tokens in order."""

    def __init__(self, seeds: Sequence[int], settings: RolloutConfig) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperature = settings.temperature
        self._warpers = LogitsProcessorList()
        if settings.top_k:
            self._warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            self._warpers.append(TopPLogitsWarper(settings.top_p))

    def draw(self, scores_NV: torch.Tensor, sequences: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(token, its log-probability at the temperature before top-p and top-k) of sequences `sequences`, N each."""
        logits_NV = scores_NV.float() / (self._temperature or 1.0)
        kept_NV = logits_NV
        if self._temperature:
            kept_NV = self._warpers(torch.zeros(0, dtype=torch.long), logits_NV)  # pyright: ignore[reportArgumentType]  # the warpers read no ids
            kept_NV = kept_NV + self._noise(sequences, logits_NV.shape[1]).to(logits_NV.device)
        chosen_N = kept_NV.argmax(dim=-1)
        return chosen_N, logits_NV.log_softmax(dim=-1).gather(1, chosen_N[:, None])[:, 0]

    def _noise(self, sequences: Sequence[int], size: int) -> torch.Tensor:
        """-log(-log(u)): the argmax of logits + noise is a sample from their softmax (Gumbel-max)."""
        uniform_NV = torch.stack([torch.rand(size, generator=self._generators[sequence]) for sequence in sequences])
        return -torch.log(-torch.log(uniform_NV.clamp(min=1e-20, max=1 - 1e-7)))
