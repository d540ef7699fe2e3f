"""Splits, duplicates and mixtures: pure functions of the rows' words and the seed."""

from __future__ import annotations

import numpy as np
import pytest
from data_parts import data_config

from orchestrator.config.data import SourceConfig, held_out_rows
from orchestrator.data.preparation.selection import first_occurrences, held_out, mixture

HASHES = np.random.default_rng(0).integers(0, 2**63, 1000).astype(np.uint64)


def test_held_out_rows_are_as_many_as_planned_and_depend_on_the_seed_alone() -> None:
    wanted = held_out_rows(1000, data_config().eval)
    chosen = held_out(HASHES, wanted, 0)
    assert chosen.sum() == wanted == 50
    assert (held_out(HASHES, wanted, 0) == chosen).all()
    assert (held_out(HASHES, wanted, 1) != chosen).any()
    shuffled = np.random.default_rng(1).permutation(1000)
    assert (held_out(HASHES[shuffled], wanted, 0) == chosen[shuffled]).all()


def test_equal_rows_go_to_the_same_side() -> None:
    hashes = np.concatenate([HASHES[:200]] * 3)
    chosen = held_out(hashes, 30, 0)
    assert chosen.sum() == 30
    assert not set(hashes[chosen].tolist()) & set(hashes[~chosen].tolist())


def test_first_occurrences() -> None:
    assert first_occurrences(np.array([5, 3, 5, 7, 3], dtype=np.uint64)).tolist() == [True, True, False, True, False]


def sources(*says: dict[str, object]) -> list[SourceConfig]:
    config = data_config(train__path="a", mix=[dict(say, path="b") for say in says[1:]])
    first = config.train.model_copy(update=says[0])
    return [first, *config.mix]


def test_mixture_by_weight_repeats_nothing_and_uses_all_it_can() -> None:
    kept = [np.arange(1000), np.arange(1000, 1300)]
    drawn = mixture(kept, sources({"weight": 1.0}, {"weight": 3.0}), seed=0)
    assert [len(rows) for rows in drawn] == [100, 300]
    assert all(len(set(rows.tolist())) == len(rows) for rows in drawn)
    again = mixture(kept, sources({"weight": 1.0}, {"weight": 3.0}), seed=0)
    assert all((a == b).all() for a, b in zip(drawn, again, strict=True))
    other = mixture(kept, sources({"weight": 1.0}, {"weight": 3.0}), seed=1)
    assert (drawn[0] != other[0]).any()


def test_mixture_by_rows_repeats_where_asked() -> None:
    kept = [np.arange(10), np.arange(10, 13)]
    drawn = mixture(kept, sources({"rows": 4}, {"rows": 7}), seed=0)
    assert [len(rows) for rows in drawn] == [4, 7]
    counts = np.bincount(drawn[1])[10:]
    assert sorted(counts.tolist()) == [2, 2, 3]
    assert (mixture(kept, sources({}, {"rows": 2}), seed=0)[0] == kept[0]).all()


def test_a_source_says_rows_or_weight() -> None:
    with pytest.raises(ValueError, match="give one of them"):
        data_config(train__rows=3, train__weight=1.0)


def test_configurations_that_contradict_themselves() -> None:
    with pytest.raises(ValueError, match="packing=none or group_by_length=false"):
        data_config(group_by_length=True, packing="best_fit")
    with pytest.raises(ValueError, match="tokens_per_batch=512 cannot hold"):
        data_config(tokens_per_batch=512)
    with pytest.raises(ValueError, match="packing=none or tokens_per_batch=null"):
        data_config(tokens_per_batch=4096, packing="best_fit")


def test_an_entry_of_a_mixture_takes_over_what_train_says() -> None:
    config = data_config(
        train__format="alpaca", train__columns={"output": "answer"}, mix=[{"path": "b.jsonl", "rows": 5}]
    )
    assert (
        config.mix[0].format == "alpaca" and config.mix[0].columns == {"output": "answer"} and config.mix[0].rows == 5
    )
