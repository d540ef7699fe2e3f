"""AdaLoRA's ranks in the training loop (2303.10512): the penalty before an update, the rank allocation after it.

PEFT's allocator does the computation; its running state is stored in the optimizer's state of each parameter, and
thus in checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch

from orchestrator.config.run import Tuning
from orchestrator.config.tuning import AdaloraTuning
from orchestrator.distributed.runtime import Runtime

IMPORTANCE, UNCERTAINTY, KEPT = "importance", "uncertainty", "kept"
"""Running values of a weight (equations 9 and 10), and 1 for the singular values kept by the last allocation."""


class RankAllocation:
    """Owns PEFT's allocator of one model. `optimizer` is the torch optimizer over the same parameters, without ZeRO."""

    def __init__(self, model: Any, optimizer: Any, tuning: AdaloraTuning, *, steps: int) -> None:
        self._allocator = model.base_model.rankallocator
        self._model = model.base_model.model
        self._states = optimizer.state
        self._weight = tuning.orthogonal_weight
        named = [(name, p) for name, p in self._model.named_parameters() if p.requires_grad and ".lora_" in name]
        self._named: list[tuple[str, torch.nn.Parameter]] = named
        self._last = steps - round(tuning.last_share * steps)
        settings = self._allocator.peft_config
        settings.total_step, settings.tfinal = steps, steps - self._last
        settings.tinit = min(round(tuning.first_share * steps), self._last - 1)

    def add_penalty(self) -> None:
        """Add the gradient of weight x mean ||P^T P - I||_F over all A and B (equation 4), once per global batch."""
        factors = [parameter for name, parameter in self._named if ".lora_E." not in name]
        with torch.enable_grad():
            penalty = self._weight * torch.stack([_distance(factor) for factor in factors]).mean()
        gradients = torch.autograd.grad(penalty, factors)
        for factor, gradient in zip(factors, gradients, strict=True):
            factor.grad = gradient if factor.grad is None else factor.grad + gradient

    @torch.no_grad()
    def allocate(self, step: int) -> None:
        """After the update of `step`, while its gradients exist: adjust ranks to the budget until they are final."""
        if step > self._last:
            for name, parameter in self._named:
                if ".lora_E." in name:
                    parameter.mul_(self._states[parameter][KEPT])
            return
        for name, parameter in self._named:
            state = self._states[parameter]
            self._allocator.ipt[name] = torch.zeros_like(parameter)
            self._allocator.exp_avg_ipt[name] = state.get(IMPORTANCE, torch.zeros_like(parameter))
            self._allocator.exp_avg_unc[name] = state.get(UNCERTAINTY, torch.zeros_like(parameter))
        # PEFT's allocator keeps running values in itself, where no checkpoint would find them: they travel through the
        # optimizer's state.
        self._allocator.update_and_allocate(self._model, step, force_mask=step == self._last)
        for name, parameter in self._named:
            state = self._states[parameter]
            state[IMPORTANCE] = self._allocator.exp_avg_ipt[name]
            state[UNCERTAINTY] = self._allocator.exp_avg_unc[name]
            if ".lora_E." in name:
                state[KEPT] = (parameter != 0).to(parameter.dtype)


def allocation_of(runtime: Runtime, model: Any, optimizer: Any, tuning: Tuning, *, steps: int) -> RankAllocation | None:
    """The allocation for Accelerate's prepared model and optimizer; None for any tuning but AdaLoRA."""
    if not isinstance(tuning, AdaloraTuning):
        return None
    return RankAllocation(runtime.accelerator.unwrap_model(model), optimizer.optimizer, tuning, steps=steps)


def _distance(factor: torch.Tensor) -> torch.Tensor:
    """Frobenius distance of a factor's small Gram matrix from the identity."""
    small = factor @ factor.T if factor.shape[0] <= factor.shape[1] else factor.T @ factor
    return torch.linalg.matrix_norm(small - torch.eye(small.shape[0], device=factor.device, dtype=factor.dtype))
