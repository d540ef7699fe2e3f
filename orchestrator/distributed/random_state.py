"""The random number generators of one rank as tensors: Python, numpy, torch on host and GPU."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of every generator that training uses."""
    version, words, gauss = random.getstate()
    assert version == 3, "Python's Mersenne Twister"
    legacy: Any = np.random.get_state(legacy=True)  # a tuple, where the stub allows the other form too
    _, keys, position, has_gauss, cached = legacy
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": _optional(gauss),
        "numpy": torch.tensor(keys.astype(np.int64)),
        "numpy_position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Restore every generator to the state recorded by `random_state`; a GPU's only if both runs have one."""
    gauss = state["python_gauss"]
    random.setstate((3, tuple(state["python"].tolist()), float(gauss[0]) if len(gauss) else None))
    position, has_gauss = state["numpy_position"].tolist()
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, float(state["numpy_gauss"][0])))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def seed_of(seed: int, *, step: int, rank: int) -> int:
    """A seed for a rank that resumes at a step with another number of ranks; unique to each rank and step."""
    digest = hashlib.sha256(f"{seed}:{step}:{rank}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def _optional(value: float | None) -> torch.Tensor:
    return torch.tensor([] if value is None else [value], dtype=torch.float64)
