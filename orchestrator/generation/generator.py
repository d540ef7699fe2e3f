"""Completions sampled from a policy, identical for any number of ranks; the interface that other generators implement.

B sequences of one forward pass, V vocabulary entries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from orchestrator.config.rollout import RolloutConfig
from orchestrator.data.encoding.tokenizer import core_tokenizer, load_facts
from orchestrator.distributed.runtime import Runtime
from orchestrator.generation.seeded_sampling import SeededDraws
from orchestrator.metrics.phases import COMPLETIONS


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A completion sampled from the policy."""

    ids: tuple[int, ...]
    """Token ids; the end token, if there is one, comes last."""
    logprobs: tuple[float, ...]
    """Of each token, as computed by the generator, at the sampling temperature."""
    is_finished: bool


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and the source of its randomness."""

    prompt: tuple[int, ...]
    seed: int


class Generate(Protocol):
    """Completions of this rank's requests, in order. Every rank calls it, with any number of requests."""

    def __call__(self, requests: Sequence[Request], settings: RolloutConfig) -> list[Completion]: ...


def seed_of(*parts: object) -> int:
    """A number determined by these parts alone."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "little")


def end_ids_of(module: Any, folder: Path) -> list[int]:
    """The tokens that end an answer, from the model's and the tokenizer's settings."""
    configured = module.generation_config.eos_token_id
    ends = set(configured if isinstance(configured, list) else [] if configured is None else [configured])
    facts = load_facts(folder)
    if facts.eos_token is not None:
        ends.add(core_tokenizer(facts.core).token_to_id(facts.eos_token))
    return sorted(ends)


def make_generate(runtime: Runtime, model: torch.nn.Module, *, end_ids: Sequence[int], pad_id: int) -> Generate:
    """transformers' generation with its key-value cache, on the weights being trained."""

    def generate(requests: Sequence[Request], settings: RolloutConfig) -> list[Completion]:
        found: list[Completion] = []
        was_training = model.training
        by_layer = runtime.generates_by_layer
        asked = _equally_many(runtime, requests, pad_id) if by_layer else requests
        weights = _sharded_weights(runtime, model) if by_layer else whole_weights(runtime, model)
        with weights as module, torch.no_grad(), runtime.forward_context():
            module.eval()
            if settings.engine == "continuous" and requests and not by_layer:
                found = _continuously(module, requests, settings, runtime=runtime, end_ids=end_ids)
            else:
                for first in range(0, len(asked), settings.generate_size):
                    part = asked[first : first + settings.generate_size]
                    found += _generate(runtime, module, part, settings, end_ids=end_ids, pad_id=pad_id)
                    runtime.phases.advance(len(found), len(asked), unit=COMPLETIONS)
        model.train(was_training)
        return found[: len(requests)]

    return generate


def _equally_many(runtime: Runtime, requests: Sequence[Request], pad_id: int) -> list[Request]:
    """The requests, filled up to the largest number of any rank: every rank must help to gather every layer."""
    filler = requests[0] if requests else Request(prompt=(pad_id,), seed=0)
    return [*requests, *[filler] * (runtime.largest_over_ranks(len(requests)) - len(requests))]


def _continuously(
    module: Any, requests: Sequence[Request], settings: RolloutConfig, *, runtime: Runtime, end_ids: Sequence[int]
) -> list[Completion]:
    from orchestrator.generation.continuous_batching import generate_continuously

    inner = module.get_base_model() if hasattr(module, "get_base_model") else module
    draws = SeededDraws([request.seed for request in requests], settings)
    prompts = [request.prompt for request in requests]
    found = generate_continuously(inner, prompts, draws, settings, runtime=runtime, end_ids=end_ids)
    return [_completion(ids, logprobs, end_ids) for ids, logprobs in found]


def _generate(
    runtime: Runtime,
    module: Any,
    requests: Sequence[Request],
    settings: RolloutConfig,
    *,
    end_ids: Sequence[int],
    pad_id: int,
) -> list[Completion]:
    width = max(len(request.prompt) for request in requests)
    ids_BT = torch.full((len(requests), width), pad_id, dtype=torch.int64, device=runtime.device)
    mask_BT = torch.zeros_like(ids_BT)
    for b, request in enumerate(requests):
        # Padded on the left: new tokens must follow the prompt directly.
        ids_BT[b, width - len(request.prompt) :] = torch.tensor(request.prompt)
        mask_BT[b, width - len(request.prompt) :] = 1
    sampler = SeededSampler(SeededDraws([request.seed for request in requests], settings))
    out_BT = module.generate(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        logits_processor=LogitsProcessorList([sampler]),
        # The processor has already sampled, with the request's own seed: what is left is an argmax.
        do_sample=False,
        num_beams=1,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=list(end_ids),
        pad_token_id=pad_id,
        use_cache=True,
        # Where every rank helps to gather each layer, all go on until the last one has finished.
        synced_gpus=runtime.generates_by_layer,
        repetition_penalty=1.0,
        temperature=None,
        top_p=None,
        top_k=None,
    )
    new_BN, logprobs_BN = out_BT[:, width:].tolist(), torch.stack(sampler.logprobs, dim=1).tolist()
    return [_completion(new, logprobs, end_ids) for new, logprobs in zip(new_BN, logprobs_BN, strict=True)]


def _completion(new: list[int], logprobs: list[float], end_ids: Sequence[int]) -> Completion:
    stop = next((index for index, token in enumerate(new) if token in end_ids), None)
    length = len(new) if stop is None else stop + 1
    return Completion(ids=tuple(new[:length]), logprobs=tuple(logprobs[:length]), is_finished=stop is not None)


class SeededSampler(LogitsProcessor):
    """Leaves only the sampled token of each sequence possible, and records its log-probability."""

    def __init__(self, draws: SeededDraws) -> None:
        self._draws = draws
        self.logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        chosen_B, logprobs_B = self._draws.draw(scores, range(len(scores)))
        self.logprobs.append(logprobs_B)
        only_BV = torch.full_like(scores, -torch.inf)
        return only_BV.scatter(1, chosen_B[:, None], 0.0)  # pyright: ignore[reportReturnType]  # transformers' own name for a tensor


@contextmanager
def _sharded_weights(runtime: Runtime, model: Any) -> Generator[Any]:
    """The unwrapped module of a sharded model: DeepSpeed's hooks gather each layer before its forward pass."""
    yield runtime.module_of(model)
    optimizer: Any = model.optimizer
    coordinator = getattr(optimizer, "parameter_offload", optimizer).param_coordinator
    if not coordinator.is_invalid_trace():  # it prefetches in the order of a training step's forward pass
        coordinator._invalidate_trace()


@contextmanager
def whole_weights(runtime: Runtime, model: torch.nn.Module) -> Generator[Any]:
    """The unwrapped module with whole weights on every rank; under ZeRO-3 gathered once, without per-layer hooks."""
    module: Any = runtime.accelerator.unwrap_model(model)
    engine: Any = model
    if not runtime.uses_deepspeed or engine.zero_optimization_stage() != 3:
        yield module
        return
    import deepspeed

    offload = engine.optimizer.parameter_offload
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        for parameter in offload.module.parameters():
            parameter.ds_active_sub_modules.clear()
        # DeepSpeed's hooks would release and gather the weights again at every token.
        for hook in [*offload.forward_hooks, *offload.backward_hooks]:
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield module
        finally:
            coordinator = engine.optimizer.parameter_offload.param_coordinator
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()
            offload._register_deepspeed_module(offload.module)
