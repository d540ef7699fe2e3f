"""Which kept rows train, which are held out, how a mixture draws them: pure functions of hashes and seed; no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from orchestrator.config.data import SourceConfig
from orchestrator.data.order import permutation

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


def first_occurrences(hashes: Hashes) -> npt.NDArray[np.bool_]:
    """True for rows without an identical earlier row."""
    _, firsts = np.unique(hashes, return_index=True)
    is_first = np.zeros(len(hashes), dtype=np.bool_)
    is_first[firsts] = True
    return is_first


def held_out(hashes: Hashes, wanted: int, seed: int) -> npt.NDArray[np.bool_]:
    """Which rows are held out: those whose text, keyed by the seed, hashes lowest; equal rows go to the same side.

    Exactly `wanted` rows if no two rows are equal; otherwise at most as many.
    """
    key = seed.to_bytes(16, "little", signed=True)
    unique, counts = np.unique(hashes, return_counts=True)
    keyed = [
        hashlib.blake2b(int(value).to_bytes(8, "little"), key=key, digest_size=8).digest() for value in unique.tolist()
    ]
    taken: list[int] = []
    left = wanted
    for index in sorted(range(len(unique)), key=keyed.__getitem__):
        if left <= 0:
            break
        if counts[index] <= left:
            taken.append(index)
            left -= int(counts[index])
    return np.isin(hashes, unique[taken])


def mixture(kept: Sequence[Ints], sources: Sequence[SourceConfig], seed: int) -> list[Ints]:
    """The rows sampled from each source's kept rows, ascending; rows repeat if `rows` asks for more than there are.

    `weight`s share the largest number of rows for which no source is repeated.
    """
    weights = {i: source.weight for i, source in enumerate(sources) if source.weight is not None}
    total_weight = sum(weights.values())
    whole = min((len(kept[i]) * total_weight / weight for i, weight in weights.items()), default=0.0)
    drawn: list[Ints] = []
    for i, (rows, source) in enumerate(zip(kept, sources, strict=True)):
        if source.rows is not None:
            wanted = source.rows
        elif source.weight is not None:
            wanted = min(len(rows), int(whole * source.weight / total_weight + 1e-9))
        else:
            drawn.append(rows)
            continue
        repeats, rest = divmod(wanted, len(rows)) if len(rows) else (0, 0)
        picked = permutation(len(rows), seed, f"mixture:{i}")[:rest]
        drawn.append(np.sort(np.concatenate([np.tile(np.arange(len(rows)), repeats), picked])).astype(np.int64))
        drawn[-1] = rows[drawn[-1]]
    return drawn
