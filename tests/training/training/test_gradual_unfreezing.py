"""Freezing, gradual unfreezing and rates by layer, on real gloo ranks under real DeepSpeed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from rank_runs import Cell, Place, largest_difference, make_place, train
from safetensors import safe_open
from safetensors.torch import load_file

from orchestrator.composition.compose import CONF
from orchestrator.config.training import ScheduleConfig
from orchestrator.files.atomic import read_json
from orchestrator.run_folder import checkpoints
from orchestrator.schedule import learning_rate_factor

FREEZE = ("tuning=freeze", "tuning.layers=all", "tuning.head=true", "tuning.embeddings=true")
GRADUAL = (*FREEZE, "tuning.unfreeze_every_steps=2")
"""Two layers: the head from step 1, layer 1 from 3, layer 0 from 5, the embeddings from 7."""
DECAYS = ("stages.sft.optimizer.weight_decay=0.1", "stages.sft.optimizer.layer_decay=0.5")
EIGHT_BIT = ("optimizer@stages.sft.optimizer=adamw_8bit", "stages.sft.optimizer.lr=2e-3")
SHARDINGS = ("none", "zero1", "zero2", "zero3")
RUNS = {
    **{f"gradual-{name}": (*GRADUAL, *DECAYS, f"sharding={name}") for name in SHARDINGS},
    "bfloat16-none": (*GRADUAL, *DECAYS, "model.dtype=bfloat16", "sharding=none"),
    "bfloat16-zero3": (*GRADUAL, *DECAYS, "model.dtype=bfloat16", "sharding=zero3"),
    "eight-zero2": (*GRADUAL, *EIGHT_BIT, "sharding=zero2"),
    "lora-zero2": ("tuning=lora", "tuning.rank=4", *DECAYS, "sharding=zero2"),
    "last-zero3": ("tuning=freeze", "tuning.layers=last 1", "sharding=zero3"),
}
CUT = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Every run, straight and again from step 4, at two ranks."""
    place = make_place(tmp_path_factory.mktemp("freezing"))
    train(place, [Cell(run=str(place.make(name, *words, ranks=2))) for name, words in RUNS.items()], ranks=2)
    again = [Cell(run=str(place.branch(name, f"{name}-again", step=CUT)), attempt=2) for name in RUNS]
    train(place, again, ranks=2)
    return place


@pytest.fixture(scope="module")
def alone(place: Place) -> Place:
    """The same in one process without sharding; and a head that stays alone, said in two ways."""
    runs = {
        "gradual": (*GRADUAL, *DECAYS),
        "closed": (*FREEZE, "tuning.unfreeze_every_steps=100"),
        "head": ("tuning=freeze", "tuning.layers=none", "tuning.head=true"),
        "lora": RUNS["lora-zero2"][:-1],
    }
    cells = [Cell(run=str(place.make(name, *words, "sharding=none", ranks=1))) for name, words in runs.items()]
    none = read_json(place.run("gradual") / "run.json")["config"]["sharding"]
    moved = place.branch("gradual-zero3", "moved", step=CUT, sharding=none, cluster__processes_per_node=1)
    train(place, [*cells, Cell(run=str(moved), attempt=2)], ranks=1)
    return place


def _weights(place: Place, name: str, attempt: int = 1) -> dict[str, torch.Tensor]:
    return load_file(place.run(name) / f"weights-{attempt}.safetensors")


def _saved(place: Place, name: str, step: int) -> tuple[dict[str, torch.Tensor], dict[str, set[float]]]:
    """(flat fp32 weights, step counts of the optimizer) by parameter, from the checkpoint's own files."""
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    counts: dict[str, set[float]] = {}
    for path in checkpoints.verify(place.stage(name).checkpoint(step)).rank_files:
        with safe_open(path, framework="pt") as handle:
            index = json.loads(handle.metadata()["index"])
            for own, numbers in index["numbers"].items():
                counts.setdefault(own, set()).update([numbers["step"]["value"]] if "step" in numbers else [])
            for own, fragment in index["fragments"].items():
                tensor = handle.get_tensor(f"weight:{own}").flatten()
                pieces.setdefault(own, []).append((fragment["start"], tensor))
    whole = {
        own: torch.cat([piece for _, piece in sorted(parts, key=lambda part: part[0])]) for own, parts in pieces.items()
    }
    return whole, counts


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith(("gradual", "bfloat16"))])
def test_a_closed_level_is_the_base_to_the_bit(place: Place, name: str) -> None:
    base = load_file(place.root / "model" / "model.safetensors")
    kind = torch.bfloat16 if name.startswith("bfloat16") else torch.float32
    for step, opened in {2: 1, 4: 2, 6: 3, 8: 4}.items():
        weights, counts = _saved(place, name, step)
        assert len(weights) == 20, "two layers of nine, embeddings, head"
        for own, tensor in weights.items():
            level = 0 if "lm_head" in own else 1 if ".1." in own else 2 if ".0." in own else 3
            same = torch.equal(tensor, base[own].to(kind).float().flatten())
            assert same == (level >= opened), (step, own)
            assert counts.get(own, set()) == (set() if level >= opened else {step - 2 * level}), (step, own)


@pytest.mark.parametrize("name", RUNS)
def test_a_resume_in_the_middle_is_the_same_to_the_bit(place: Place, name: str) -> None:
    straight, again = place.rows(name), place.rows(f"{name}-again")
    assert sorted(again) == [5, 6, 7, 8]
    assert all(again[step][key] == straight[step][key] for step in again for key in ("loss", "grad_norm", "lr"))
    one, other = _weights(place, name), _weights(place, f"{name}-again", 2)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_two_ranks_train_as_one(alone: Place, sharding: str) -> None:
    _assert_alike(alone, f"gradual-{sharding}", "gradual")


def test_rates_by_layer_of_an_adapter_do_not_depend_on_the_ranks(alone: Place) -> None:
    _assert_alike(alone, "lora-zero2", "lora")


def _assert_alike(place: Place, name: str, other: str) -> None:
    ours, theirs = place.rows(name), place.rows(other)
    assert sorted(ours) == sorted(theirs) == list(range(1, 9))
    assert largest_difference(ours, theirs, "loss") < 1e-4
    assert largest_difference(ours, theirs, "grad_norm") < 1e-4


def test_a_run_goes_on_without_sharding_on_one_rank(alone: Place) -> None:
    rows, straight = alone.rows("moved"), alone.rows("gradual-zero3")
    assert sorted(rows) == [5, 6, 7, 8] and largest_difference(rows, straight, "loss") < 1e-6


def test_what_is_closed_is_as_if_it_were_not_trained(alone: Place) -> None:
    closed, head = alone.rows("closed"), alone.rows("head")
    assert all(closed[step][key] == head[step][key] for step in range(1, 9) for key in ("loss", "grad_norm"))
    (trained,) = _weights(alone, "head")
    assert trained == "lm_head.weight"
    assert torch.equal(_weights(alone, "closed")[trained], _weights(alone, "head")[trained])


def test_a_layer_that_is_lower_learns_more_slowly(place: Place) -> None:
    """AdamW's first step moves each weight by its rate (and the decay, which is small): a half for each layer downwards."""
    base = load_file(place.root / "model" / "model.safetensors")
    moved: dict[str, float] = {}
    for step, own in {4: "model.layers.1.mlp.up_proj.weight", 6: "model.layers.0.mlp.up_proj.weight"}.items():
        weights, _ = _saved(place, "gradual-none", step)
        rates = [float(str(place.rows("gradual-none")[at]["lr"])) for at in (step - 1, step)]
        moved[own] = float((weights[own] - base[own].flatten()).abs().median()) / sum(rates)
    high, low = moved.values()
    assert 0.3 < high < 0.6 and low / high == pytest.approx(0.5, abs=0.1)


def test_a_checkpoint_holds_only_what_is_trained(place: Place) -> None:
    weights, _ = _saved(place, "last-zero3", 8)
    assert len(weights) == 9 and all(".layers.1." in name for name in weights)


def test_the_plan_of_unfreezing_is_told(place: Place) -> None:
    (event,) = place.events("gradual-zero3", "unfreezing")
    assert event["levels"] == [[1, ["head"]], [3, ["layer 1"]], [5, ["layer 0"]], [7, ["embeddings"]]]


def _shipped(name: str, **changes: Any) -> list[float]:
    values = yaml.safe_load((CONF / "schedule" / f"{name}.yaml").read_text())
    schedule = ScheduleConfig.model_validate({**values, **changes})
    return [learning_rate_factor(schedule, step, 100) for step in range(1, 101)]


def _theirs(make: Callable[..., Any], **settings: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    rule = make(optimizer, **settings).lr_lambdas[0]
    return [rule(step) for step in range(1, 101)]


def test_the_schedules_are_those_of_transformers() -> None:
    from transformers import optimization as theirs

    warm = {"num_warmup_steps": 5, "num_training_steps": 100}
    assert _shipped("linear") == pytest.approx(_theirs(theirs.get_linear_schedule_with_warmup, **warm))
    cosine = _theirs(theirs.get_cosine_schedule_with_warmup, **warm)
    assert _shipped("cosine", final_ratio=0.0) == pytest.approx(cosine)
    assert _shipped("constant") == pytest.approx(_theirs(theirs.get_constant_schedule_with_warmup, num_warmup_steps=5))
    stable = {"num_warmup_steps": 5, "num_stable_steps": 85, "num_decay_steps": 10, "decay_type": "linear"}
    assert _shipped("warmup_stable_decay") == pytest.approx(_theirs(theirs.get_wsd_schedule, **stable))
