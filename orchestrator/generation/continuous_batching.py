"""transformers' continuous batching as the generator: a finished sequence frees its slot for the next one at once.

N sequences that get a token in a step, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)

from orchestrator.config.rollout import RolloutConfig
from orchestrator.distributed.runtime import Runtime
from orchestrator.errors import TrainingFailed
from orchestrator.generation.seeded_sampling import SeededDraws

PAGE_TOKENS = 256
"""Tokens per page of the cache; transformers' default."""
NO_END = -1
LONGEST_WAIT_SECONDS = 3600.0
POLL_SECONDS = 1.0


class _Sampler(ContinuousBatchingLogitsProcessor):
    """Samples each sequence's token with its own noise, at any position in the current batch."""

    supported_kwargs = {"sequence": int}  # noqa: RUF012 - the base class declares it so
    ignored_kwargs = ()

    def __init__(self, draws: SeededDraws) -> None:
        self._draws = draws
        self._sequences: list[int] = []
        self.logprobs: list[tuple[list[int], torch.Tensor]] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.fill_(0)

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> torch.Tensor:
        self._sequences = [request.state.logit_processor_kwargs["sequence"] for request in requests_with_new_token]
        return torch.tensor(self._sequences, dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        count = len(self._sequences)
        chosen_N, logprobs_N = self._draws.draw(scores[:count], self._sequences)
        self.logprobs.append((list(self._sequences), logprobs_N))
        only_NV = torch.full_like(scores, -torch.inf)
        only_NV[:count].scatter_(1, chosen_N[:, None], 0.0)
        return only_NV

    def by_sequence(self, number: int) -> list[list[float]]:
        """The log-probabilities of each sequence's tokens, in their order."""
        found: list[list[float]] = [[] for _ in range(number)]
        for sequences, logprobs_N in self.logprobs:
            for sequence, logprob in zip(sequences, logprobs_N.tolist(), strict=True):
                found[sequence].append(logprob)
        return found


def generate_continuously(
    module: Any,
    prompts: Sequence[Sequence[int]],
    draws: SeededDraws,
    settings: RolloutConfig,
    *,
    runtime: Runtime,
    end_ids: Sequence[int],
) -> list[tuple[list[int], list[float]]]:
    """(new tokens, their log-probabilities) of every prompt, `generate_size` at a time; else TrainingFailed."""
    sampler = _Sampler(draws)
    with _in_the_trainers_precision(module, runtime):
        manager = module.init_continuous_batching(
            generation_config=GenerationConfig(
                max_new_tokens=settings.max_new_tokens, do_sample=False, eos_token_id=list(end_ids) or NO_END
            ),
            continuous_batching_config=_settings(prompts, settings),
        )
        manager.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([sampler]))
        manager.logit_processor.tensors_required = 1
        manager.start()
        try:
            for sequence, prompt in enumerate(prompts):
                manager.add_request(list(prompt), request_id=str(sequence), sequence=sequence)
            found = _collect(manager, len(prompts))
        finally:
            manager.stop(block=True, timeout=LONGEST_WAIT_SECONDS)
            manager.destroy()
    # The manager may compute a token beyond the end of a sequence; the cut below drops its entry.
    logprobs = sampler.by_sequence(len(prompts))
    return [(ids, logprobs[sequence][: len(ids)]) for sequence, ids in enumerate(found)]


def _collect(manager: Any, number: int) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    while len(found) < number:
        result = manager.get_result(timeout=POLL_SECONDS)
        if result is None:
            if not manager.is_running():
                raise TrainingFailed("the generator ended without an answer; type rollout.engine=batch")
            continue
        if result.error is not None:
            raise TrainingFailed(f"the generator failed: {result.error}; type rollout.engine=batch")
        if result.is_finished():
            found[int(result.request_id)] = list(result.generated_tokens)
    return [found[sequence] for sequence in range(number)]


def _settings(prompts: Sequence[Sequence[int]], settings: RolloutConfig) -> ContinuousBatchingConfig:
    """A cache for exactly `generate_size` sequences; no captured graph or second stream: they would reorder."""
    longest = max(len(prompt) for prompt in prompts) + settings.max_new_tokens
    pages = -(-longest // PAGE_TOKENS) + 1
    return ContinuousBatchingConfig(
        page_size=PAGE_TOKENS,
        num_blocks=pages * settings.generate_size,
        max_batch_tokens=max(longest, settings.generate_size),
        max_requests_per_batch=settings.generate_size,
        max_memory_percent=0.8,
        allow_block_sharing=False,
        use_async_batching=False,
        use_cuda_graph=False,
        auto_switch_to_flash=False,
    )


@contextmanager
def _in_the_trainers_precision(module: Any, runtime: Runtime) -> Generator[None]:
    """The forward pass in the trainer's precision: the generator runs in a thread, where autocast would be off."""
    original = module.forward

    def forward(*inputs: Any, **named: Any) -> Any:
        with torch.no_grad(), runtime.forward_context():
            return original(*inputs, **named)

    module.forward = forward
    try:
        yield
    finally:
        del module.forward
