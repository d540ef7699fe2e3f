"""Adapters on two real gloo ranks: they train as one process does, and a resume in the middle is the same to the bit."""

from __future__ import annotations

import pytest
from rank_runs import Cell, Place, largest_difference, make_place, train
from safetensors.torch import load_file

RUNS = {
    "loreft-zero2": ("tuning=loreft", "tuning.share_weights=false", "tuning.dropout=0.1"),
    "loreft-zero3": ("tuning=loreft", "stages.sft.data.packing=best_fit"),
    "pissa-zero2": ("tuning=lora", "tuning.init=pissa_niter_4", "tuning.lora_plus_ratio=4"),
    "adalora-none": ("tuning=adalora", "tuning.rank=2", "tuning.initial_rank=4", "tuning.allocate_every_steps=1"),
}
ALONE = ("loreft-zero3", "pissa-zero2", "adalora-none")
"""Without dropout, whose masks the ranks draw apart."""
SHORT = ("stages.sft.max_steps=4", "stages.sft.optimizer.lr=5e-3")
CUT = 2


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Every run, straight and again from step 2, at two ranks; some in one process without sharding."""
    place = make_place(tmp_path_factory.mktemp("adapters"))
    words = {name: (*RUNS[name], *SHORT) for name in RUNS}
    made = [place.make(name, *words[name], f"sharding={name.split('-')[1]}", ranks=2) for name in RUNS]
    train(place, [Cell(run=str(run)) for run in made], ranks=2)
    train(place, [Cell(run=str(place.branch(name, f"{name}-again", step=CUT)), attempt=2) for name in RUNS], ranks=2)
    alone = [place.make(f"{name}-alone", *words[name], "sharding=none", ranks=1) for name in ALONE]
    train(place, [Cell(run=str(run)) for run in alone], ranks=1)
    return place


@pytest.mark.parametrize("name", RUNS)
def test_a_resume_in_the_middle_is_the_same_to_the_bit(place: Place, name: str) -> None:
    straight, again = place.rows(name), place.rows(f"{name}-again")
    assert sorted(straight) == [1, 2, 3, 4] and sorted(again) == [3, 4]
    assert all(again[step][key] == straight[step][key] for step in again for key in ("loss", "grad_norm", "lr"))
    one = load_file(place.run(name) / "weights-1.safetensors")
    other = load_file(place.run(f"{name}-again") / "weights-2.safetensors")
    assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


@pytest.mark.parametrize("name", ALONE)
def test_two_ranks_train_as_one(place: Place, name: str) -> None:
    ours, theirs = place.rows(name), place.rows(f"{name}-alone")
    assert sorted(ours) == sorted(theirs) == [1, 2, 3, 4]
    assert ours[4]["loss"] != ours[1]["loss"]
    assert largest_difference(ours, theirs, "loss") < 1e-4
    assert largest_difference(ours, theirs, "grad_norm") < 1e-4
