"""Makes a rollout: prompts, completions, rewards, log-probabilities, advantages, health; the same on all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from orchestrator.alignment.credit_assignment import with_advantages
from orchestrator.alignment.policy_health import PolicyHealth, health_of, judge
from orchestrator.alignment.reference_policy import UseReference
from orchestrator.alignment.rewards import Rewards
from orchestrator.alignment.rollout_rows import (
    RolloutOrder,
    RolloutRows,
    ScoredCompletion,
    forget_rollouts,
    prompts_of,
    read_rollout,
    share,
    write_rollout,
)
from orchestrator.config.alignment import PolicyStage
from orchestrator.data.encoding.tokenizer import load_tokenizer
from orchestrator.dataloader.batch import batch_of
from orchestrator.errors import TrainingFailed
from orchestrator.generation.generator import Completion, Generate, Request, seed_of
from orchestrator.generation.samples import Scored, as_scored
from orchestrator.losses.token_logprobs import IGNORED
from orchestrator.metrics.jsonl import RecordFile
from orchestrator.run_folder.checkpoints import saved_steps
from orchestrator.training.objectives import token_scores_BT
from orchestrator.training.recipe import Session

SHOWN_SAMPLES = 4
"""Completions of a rollout that are written to the samples for inspection."""


@dataclass(kw_only=True)
class RolloutMaker:
    """Owns the current rollout. Every rank calls `before_step` at the same step."""

    session: Session
    stage: PolicyStage
    order: RolloutOrder
    rows: RolloutRows
    generate: Generate
    rewards: Rewards
    reference: UseReference | None
    health: PolicyHealth | None = None

    def before_step(self, step: int) -> Mapping[str, Any]:
        """Make the rollout if `step` (from 1) is its first, else load the saved one; return its row of metrics."""
        number, within = self.order.rollout(step - 1)
        folder = self.session.context.folder.rollouts
        if within and self.rows.number != number:
            sequences, state = read_rollout(folder, number)
            self.rows.take(number, sequences)
            self.health = PolicyHealth(**state)
        elif not within:
            self._make(number, step)
        assert self.health is not None
        return self.health.metrics

    def _make(self, number: int, step: int) -> None:
        context, runtime = self.session.context, self.session.runtime
        drawn = prompts_of(self.session.rows, self.stage, number, context.config.seeds.data)
        sequences = share(runtime, self._sample(drawn, number))
        sequences = with_advantages(sequences, self.stage)
        if number and self.health is None:
            self.health = PolicyHealth(**read_rollout(context.folder.rollouts, number - 1)[1])
        self.health = health_of(sequences, self.stage, before=self.health)
        self.rows.take(number, sequences)
        if runtime.is_main:
            write_rollout(context.folder.rollouts, number, sequences, vars(self.health))
            self._write_samples(sequences, step)
            oldest = min(saved_steps(context.folder), default=None)
            if oldest is not None:
                forget_rollouts(context.folder.rollouts, before=self.order.rollout(oldest)[0] - 1)
        problem = judge(self.health, self.stage)
        if problem is not None:
            kept = max(saved_steps(context.folder), default=None)
            where = f"; the last checkpoint is step {kept}" if kept is not None else ""
            raise TrainingFailed(f"step {step}: {problem}{where}")

    def _sample(self, drawn: Sequence[int], number: int) -> list[ScoredCompletion]:
        """This rank's completions of its share of the prompts, scored."""
        runtime, size = self.session.runtime, self.stage.rollout.group_size
        each = len(drawn) // runtime.world_size
        first = runtime.rank * each
        prompts = [self.session.rows.prompt(index) for index in drawn[first : first + each]]
        seed = self.session.context.config.seeds.data
        requests = [
            Request(prompt=prompt.ids, seed=seed_of(seed, number, first + p, g))
            for p, prompt in enumerate(prompts)
            for g in range(size)
        ]
        completions = self.generate(requests, self.stage.rollout)
        extras = [(prompt.row, prompt.extra) for prompt in prompts for _ in range(size)]
        return self._scored(requests, completions, extras)

    def _scored(
        self,
        requests: Sequence[Request],
        completions: Sequence[Completion],
        extras: Sequence[tuple[int, Mapping[str, Any]]],
    ) -> list[ScoredCompletion]:
        scored = [
            as_scored(self.session.context, request, completion, row)
            for request, completion, (_, row) in zip(requests, completions, extras, strict=True)
        ]
        sums, apart = self.rewards.of(scored)
        old, entropies = self.logprobs(scored)
        reference = [(0.0,) * len(one) for one in old]
        if self.reference is not None:
            with self.reference() as model:
                reference, _ = self.logprobs(scored, model=model)
        return [
            ScoredCompletion(
                prompt=one.prompt_ids,
                completion=one.completion_ids,
                generator=completions[i].logprobs,
                old=old[i],
                reference=reference[i],
                entropy=entropies[i],
                is_finished=completions[i].is_finished,
                row=extras[i][0],
                reward=sums[i],
                rewards={name: values[i] for name, values in apart.items()},
            )
            for i, one in enumerate(scored)
        ]

    @torch.no_grad()
    def logprobs(
        self, scored: Sequence[Scored], *, model: torch.nn.Module | None = None
    ) -> tuple[list[tuple[float, ...]], list[float]]:
        """(log-probability of each completion token, summed entropy) under the policy or `model`; every rank calls."""
        runtime = self.session.runtime
        model = self.session.model if model is None else model
        micro_size = self.stage.batch.micro_size
        temperature = self.stage.rollout.temperature or 1.0
        found: list[tuple[float, ...]] = []
        entropies: list[float] = []
        was_training = model.training
        model.eval()
        for first in range(0, len(scored), micro_size):
            part = scored[first : first + micro_size]
            batch = batch_of([_with_mask(one) for one in part], list(range(len(part)))).to(runtime.device)
            logprobs_BT, entropies_BT = token_scores_BT(runtime, model, batch, temperature=temperature, entropies=True)
            assert entropies_BT is not None
            for b in range(len(part)):
                found.append(tuple(logprobs_BT[b, batch.labels_BT[b] != IGNORED].tolist()))
            entropies += entropies_BT.sum(dim=1).tolist()
        model.train(was_training)
        return found, entropies

    def _write_samples(self, sequences: Sequence[ScoredCompletion], step: int) -> None:
        context = self.session.context
        tokenizer = load_tokenizer(context.base_folder)
        with RecordFile(context.folder.generated) as file:
            for one in sequences[:SHOWN_SAMPLES]:
                row = {
                    "step": step,
                    "attempt": context.attempt,
                    "prompt": tokenizer.decode(list(one.prompt), skip_special_tokens=True),
                    "completion": tokenizer.decode(list(one.completion), skip_special_tokens=True),
                    "reward": one.reward,
                    "rewards": dict(one.rewards),
                    "advantage": one.advantage,
                }
                file.append(row)


def _with_mask(one: Scored) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array([*one.prompt_ids, *one.completion_ids], dtype=np.int64)
    return ids, np.arange(len(ids)) >= len(one.prompt_ids)
