"""The moments of a traced pass that can be the peak of some model, as polynomials in its dimensions."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

DEPTHS = (2, 3)
"""Layers of the two traced models, which give the bytes of the base and of each further layer."""
SAMPLES = 4000
GOOD_ENOUGH = 0.995
"""Moments are left out that no sampled model needs to come this near to its peak."""
NEGLIGIBLE = 2e-4
"""Share of the bytes of every sampled model under which a term is left out."""

Polynomial = dict[str, tuple[float, float]]
"""Monomial such as `N.h` -> bytes at two layers, more bytes for each further layer."""

Moments = list[tuple[np.ndarray, np.ndarray]]


def chosen(moments: Moments, names: list[str]) -> list[Polynomial]:
    """As few moments as are near every sampled model's peak."""
    sampled, layers = samples(names)
    base, slope = (np.stack([moment[which] for moment in moments])[:, : len(names)] for which in (0, 1))
    bytes_MS = base @ sampled + (slope @ sampled) * (layers - DEPTHS[0])
    peak_S = bytes_MS.max(axis=0)
    kept: list[int] = []
    reached_S = np.zeros_like(peak_S)
    while (reached_S < GOOD_ENOUGH * peak_S).any():
        best = int((np.maximum(bytes_MS, reached_S) >= GOOD_ENOUGH * peak_S).sum(axis=1).argmax())
        if best in kept:
            best = int(bytes_MS[:, int((peak_S - reached_S).argmax())].argmax())
        kept.append(best)
        reached_S = np.maximum(reached_S, bytes_MS[best])
    small = negligible(moments, kept, names)
    return [as_polynomial(moments[place], names, small) for place in kept]


def negligible(moments: Moments, kept: Sequence[int], names: list[str]) -> set[str]:
    """Terms that matter in no sampled model, such as position numbers."""
    sampled, layers = samples(names)
    share = np.zeros(len(names))
    for place in kept:
        base, slope = (part[: len(names), None] for part in moments[place])
        terms = np.abs(base * sampled + slope * sampled * (layers - DEPTHS[0]))
        share = np.maximum(share, (terms / terms.sum(axis=0)).max(axis=1))
    return {name for name, part in zip(names, share, strict=True) if part < NEGLIGIBLE}


def samples(names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Values of the monomials for models and batches of every size, and their layers."""
    random = np.random.default_rng(0)
    head_dim = random.choice([64, 80, 96, 128, 256], SAMPLES)
    groups = random.choice([1, 2, 4, 8], SAMPLES)
    key_heads = random.integers(1, 17, SAMPLES)
    hidden = np.where(
        random.random(SAMPLES) < 0.5, groups * key_heads * head_dim, 256 * random.integers(2, 65, SAMPLES)
    )
    length = np.exp(random.uniform(np.log(64), np.log(131072), SAMPLES))
    chosen_values = {
        "N": length, "h": hidden, "q": groups * key_heads * head_dim, "k": key_heads * head_dim,
        "f": hidden * random.uniform(0.4, 8, SAMPLES), "H": groups * key_heads, "K": key_heads, "D": head_dim,
        "V": np.exp(random.uniform(np.log(1000), np.log(262144), SAMPLES)), "r": 2.0 ** random.integers(0, 9, SAMPLES),
        "E": random.integers(4, 129, SAMPLES), "A": random.integers(1, 9, SAMPLES), "P": random.integers(512, 8193, SAMPLES),
    }  # fmt: skip
    products = [
        np.prod([chosen_values[part] for part in name.split(".") if part] or [np.ones(SAMPLES)], axis=0)
        for name in names
    ]
    return np.stack(products), random.integers(2, 101, SAMPLES)


def as_polynomial(moment: tuple[np.ndarray, np.ndarray], names: list[str], small: Collection[str]) -> Polynomial:
    base, slope = moment
    pairs = {
        name: (round(float(base[i]), 3), round(float(slope[i]), 3)) for i, name in enumerate(names) if name not in small
    }
    return {name: pair for name, pair in pairs.items() if pair != (0.0, 0.0)}
