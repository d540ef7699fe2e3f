"""Gradual unfreezing: levels of trained parameters that open one after another, as a pure function of the step.

Every parameter that will be trained is in the optimizer, the checkpoints and ZeRO's partitions from the start. A closed
level gets a gradient of zeros, which affects neither the norm nor clipping, and the optimizer skips its groups: no
decay, no moments, no step count. Its weights stay bit-equal, and its optimizer state begins at the step that opens it.
Resuming needs no extra state. The backward pass through the closed levels is not saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from orchestrator.architecture.layers import count_layers, describe_locations, levels_of
from orchestrator.config.run import Tuning
from orchestrator.config.tuning import FreezeTuning
from orchestrator.run_state.recorder import Recorder
from orchestrator.schedule import level_opens_at, open_levels

LEVEL = "level"
"""Key of a parameter group."""


def gradual_unfreezing(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Unfreezing:
    """Set it up before Accelerate prepares model and optimizer: hooks stay on parameters that ZeRO shards."""
    named = dict(model.named_parameters())
    trained = [name for name, parameter in named.items() if parameter.requires_grad]
    unfreezing = Unfreezing(levels_of(trained, count_layers(named)))
    for name, level in unfreezing.levels.items():
        named[name].register_hook(unfreezing.gradient_hook(level))
    optimizer.register_step_pre_hook(unfreezing.hold)
    optimizer.register_step_post_hook(unfreezing.give_back)
    return unfreezing


class Unfreezing:
    """Owns which levels are open. Every rank must call `go_to` before the forward pass of a step."""

    def __init__(self, levels: Mapping[str, int]) -> None:
        self.levels = levels
        """By parameter name; 0 is open from the first step."""
        self.every_steps = 0.0
        """Steps between two levels."""
        self._open = 1
        self._held: list[tuple[Any, Any]] = []

    def plan(self, tuning: Tuning, record: Recorder, *, steps: int, steps_per_epoch: int) -> None:
        """Decide which step opens which level, and record it."""
        assert isinstance(tuning, FreezeTuning)
        self.every_steps = tuning.unfreeze_every_steps or (tuning.unfreeze_every_epochs or 0.0) * steps_per_epoch
        opens = {level: level_opens_at(level, every_steps=self.every_steps) for level in range(self.count)}
        record.event(
            "unfreezing", levels=[[step, describe_locations(self.names(level))] for level, step in opens.items()]
        )
        for level, step in opens.items():
            never = "" if step <= steps else f" (warning: never, the stage has {steps} steps)"
            record.log(f"trained from step {step}: {', '.join(describe_locations(self.names(level)))}{never}")

    def go_to(self, step: int) -> int:
        """Open the levels due at a step (from 1); return the number of open levels."""
        self._open = open_levels(step, every_steps=self.every_steps, levels=self.count)
        return self._open

    @property
    def count(self) -> int:
        return max(self.levels.values()) + 1

    def names(self, level: int) -> list[str]:
        return [name for name, own in self.levels.items() if own == level]

    def gradient_hook(self, level: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda gradient: gradient if level < self._open else torch.zeros_like(gradient)

    def hold(self, optimizer: torch.optim.Optimizer, _arguments: Any, _options: Any) -> None:
        """Make the optimizer skip parameters of closed levels (no gradient); ZeRO offload needs its buffers back."""
        closed = [group for group in optimizer.param_groups if group[LEVEL] >= self._open]
        self._held = [(master, master.grad) for group in closed for master in group["params"]]
        for master, _ in self._held:
            # torch's optimizers skip parameters without a gradient: no decay, no moments, no step count.
            master.grad = None

    def give_back(self, _optimizer: torch.optim.Optimizer, _arguments: Any, _options: Any) -> None:
        for master, gradient in self._held:
            master.grad = gradient
        self._held = []
