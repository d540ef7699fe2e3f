"""Classifiers and self-training on gloo ranks: two ranks train as one process, and a resume is bit-equal."""

from __future__ import annotations

import shutil

import pytest
import tiny_model
import torch
from classification_runs import words_of as run_words
from classification_runs import write_encoder, write_sets
from rank_runs import Cell, Place, largest_difference, train
from safetensors.torch import load_file

from orchestrator.classification.classes import Classes
from orchestrator.classification.model import load_classifier
from orchestrator.composition.compose import compose
from orchestrator.files.atomic import write_json
from orchestrator.metrics.jsonl import last_attempt_rows, read_rows
from orchestrator.planning.absolute_paths import resolve
from orchestrator.run_folder.folder import RunFolder, StageFolder

CLASSIFIERS = {
    "full": ("tuning=full",),
    "lora": ("tuning=lora",),
    "freeze": ("tuning=freeze", "tuning.layers=last 1", "stages.classify.optimizer.layer_decay=0.5"),
    "bert": ("tuning=full", "base=bert"),
}
SHARDED = (
    ("full", "none"),
    ("full", "zero2"),
    ("full", "zero3"),
    ("lora", "zero3"),
    ("freeze", "zero1"),
    ("bert", "zero3"),
)
SELF = ("stages.self_training.period=3", "stages.self_training.threshold=0.0", "tuning=full")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("classify_ranks")
    write_sets(root)
    tiny_model.write_llama(root / "model")
    write_encoder(root / "bert", "bert")
    torch.manual_seed(3)
    classes = Classes(problem="single_label", names=("blue", "green", "red"))
    config = compose(["+experiment=llama_classify", f"model.base={root / 'model'}", "model.dtype=float32"])
    start = load_classifier(root / "model", config, classes, weights_dtype=torch.float32, packed=False)
    start.save_pretrained(root / "start")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(root / "model" / name, root / "start" / name)
    return Place(root=root)


def make(place: Place, name: str, *words: str, stage: str = "classify", ranks: int = 1) -> Cell:
    """Writes run.json of a six-step run that saves every second step."""
    base = next((word.removeprefix("base=") for word in words if word.startswith("base=")), "model")
    experiment = "llama_classify" if stage == "classify" else "llama_weak_supervision"
    more = [word for word in words if not word.startswith("base=")]
    more += [f"cluster.processes_per_node={ranks}", f"stages.{stage}.checkpoint.every_steps=2"]
    more += [f"stages.{stage}.checkpoint.keep_last=99", f"stages.{stage}.checkpoint.probe_rows=4"]
    launcher = "launcher=local" if ranks == 1 else "launcher=torchrun"
    config = resolve(
        compose([*run_words(place.root, name, *more, launcher, base=base, experiment=experiment)]), place.root
    )
    write_json(place.run(name) / "run.json", {"config": config.model_dump(mode="json")})
    start = str(place.root / "start") if stage == "self_training" else None
    return Cell(run=str(place.run(name)), stage=stage, start=start)


def rows_of(place: Place, name: str, stage: str = "classify") -> dict[int, dict[str, object]]:
    rows = last_attempt_rows(read_rows(RunFolder(place.run(name)).stage(stage).metrics))
    return {int(str(row["step"])): dict(row) for row in rows if "loss" in row}


@pytest.fixture(scope="module")
def trained(place: Place) -> Place:
    """Every run of this file: first by one process, then by two."""
    cells = [make(place, f"{name}-1", *words) for name, words in CLASSIFIERS.items()]
    cells.append(make(place, "self-1", *SELF, stage="self_training"))
    train(place, cells, ranks=1)
    pairs = [
        make(place, f"{name}-{sharding}", *CLASSIFIERS[name], f"sharding={sharding}", ranks=2)
        for name, sharding in SHARDED
    ]
    pairs.append(make(place, "self-zero2", *SELF, "sharding=zero2", stage="self_training", ranks=2))
    pairs.append(make(place, "resumed", *SELF, "sharding=zero2", stage="self_training", ranks=2))
    train(place, pairs[:-1], ranks=2)
    shutil.copytree(_stage(place, "self-zero2").checkpoint(4), _stage(place, "resumed").checkpoint(4))
    shutil.copytree(_stage(place, "self-zero2").reference, _stage(place, "resumed").reference)
    lost = make(place, "lost", *SELF, "sharding=zero2", stage="self_training", ranks=2)
    shutil.copytree(_stage(place, "self-zero2").checkpoint(4), _stage(place, "lost").checkpoint(4))
    gone = Cell(
        run=lost.run, stage=lost.stage, start=lost.start, expect="the model that made its labels has been trained since"
    )
    train(place, [pairs[-1], gone], ranks=2)
    return place


def _stage(place: Place, name: str) -> StageFolder:
    return RunFolder(place.run(name)).stage("self_training")


@pytest.mark.parametrize(("name", "sharding"), SHARDED)
def test_two_ranks_classify_as_one(trained: Place, name: str, sharding: str) -> None:
    one, two = rows_of(trained, f"{name}-1"), rows_of(trained, f"{name}-{sharding}")
    assert len(one) == len(two) == 6
    assert largest_difference(one, two, "loss") < 1e-4 and largest_difference(one, two, "grad_norm") < 1e-3
    assert [row["accuracy"] for row in one.values()] == [row["accuracy"] for row in two.values()]


def test_two_ranks_train_themselves_as_one(trained: Place) -> None:
    one, two = (rows_of(trained, name, "self_training") for name in ("self-1", "self-zero2"))
    assert len(one) == len(two) == 6
    for column in ("loss", "fit", "contrastive", "confidence", "grad_norm", "pseudo_accuracy"):
        assert largest_difference(one, two, column) < 1e-4, column
    told = [row for row in read_rows(_stage(trained, "self-1").events) if row["event"] == "pseudo_labels"]
    assert [row["step"] for row in told] == [1, 4]
    assert one[3]["pseudo_accuracy"] == told[0]["accuracy"] and one[4]["pseudo_accuracy"] == told[1]["accuracy"]
    weights = [
        load_file(_stage(trained, "self-1").reference / f"pseudo-labels-{step:08d}.safetensors") for step in (1, 4)
    ]
    assert not torch.equal(weights[0]["labels_DC"], weights[1]["labels_DC"]), (
        "a period later the model says something else"
    )


def test_a_resume_in_the_middle_of_a_period_is_bit_equal(trained: Place) -> None:
    straight, resumed = (rows_of(trained, name, "self_training") for name in ("self-zero2", "resumed"))
    assert sorted(resumed) == [5, 6]
    assert all(
        resumed[step][key] == straight[step][key]
        for step in (5, 6)
        for key in ("loss", "fit", "contrastive", "grad_norm")
    )
    ours, theirs = (load_file(trained.run(name) / "weights-1.safetensors") for name in ("self-zero2", "resumed"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
