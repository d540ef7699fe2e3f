"""WiSE-FT between two classifiers of an encoder: the head alone, then all of it, and the weights between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bench import Bench, Done, make_bench
from classification_runs import colours, words_of, write_encoder, write_labelled, write_sets
from safetensors.torch import load_file

from orchestrator.files.atomic import read_json

ALPHAS = (0.0, 0.25, 0.5, 1.0)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = make_bench(tmp_path_factory.mktemp("classifier_blend"))
    write_sets(bench.root)
    write_labelled(bench.root / "shifted.jsonl", [{**row, "text": f"say {row['text']}"} for row in colours(2000, 18)])
    write_encoder(bench.root / "bert", "bert")
    return bench


def blend_words(root: Path, name: str, *more: str, base: str = "bert") -> list[str]:
    """Head, all, the weights between, and what was chosen once more."""
    words = words_of(root, name, base=base)
    stages = ("wise", "ev")
    for stage in stages:
        words += [
            f"stages.{stage}.data.train.path={root / 'held_out_colours.jsonl'}",
            f"stages.{stage}.data.train.format=classification",
            f"stages.{stage}.data.max_length=96",
            f"stages.{stage}.sets={{shifted: {{path: {root / 'shifted.jsonl'}, shift: true}}}}",
        ]
    return [
        *words,
        "pipeline=[head,classify,wise,ev]",
        "tuning=full",
        "+stage@stages.head=classify",
        "+tuning@stages.head.tuning=freeze",
        "stages.head.tuning.layers=none",
        *(word.replace("stages.classify.", "stages.head.") for word in words if word.startswith("stages.classify.")),
        "stages.classify.start_from=head",
        "stages.classify.max_steps=20",
        "+stage@stages.wise=interpolate",
        "stages.wise.origin=head",
        f"stages.wise.alphas={list(ALPHAS)}",
        "stages.wise.choose_by=loss",
        "stages.wise.choose_on=[data,shifted]",
        "+stage@stages.ev=evaluate",
        *more,
    ]


@pytest.fixture(scope="module")
def done(bench: Bench) -> Done:
    return bench.run("blend", words=blend_words(bench.root, "blend"))


def accuracy(folder: Path, file: Path, weights: dict[str, torch.Tensor]) -> float:
    """By transformers alone, one text at a time."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model: Any = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    model.load_state_dict(weights)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    import json

    rows = [json.loads(line) for line in file.read_text().splitlines()]
    right = 0
    for row in rows:
        with torch.no_grad():
            number = int(model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax())
        right += model.config.id2label[number] == row["label"]
    return right / len(rows)


def test_every_a_scores_what_transformers_says_of_its_weights(bench: Bench, done: Done) -> None:
    assert done.code == 0, done.told
    curves = read_json(done.folder.stage("wise").curves)
    assert curves["shift"] == {"data": False, "shifted": True} and curves["alphas"] == list(ALPHAS)
    head, classify = (done.folder.stage(name).artifact for name in ("head", "classify"))
    zero, one = load_file(head / "model.safetensors"), load_file(classify / "model.safetensors")
    moved = {name for name in zero if not torch.equal(zero[name], one[name])}
    assert "classifier.weight" in moved and any(".layer.1." in name for name in moved)
    files = {"data": bench.root / "held_out_colours.jsonl", "shifted": bench.root / "shifted.jsonl"}
    seen = set()
    for alpha, scores in zip(ALPHAS, curves["scores"], strict=True):
        weights = {name: torch.lerp(zero[name], one[name], alpha) for name in zero}
        for name, file in files.items():
            assert scores[name]["accuracy"] == pytest.approx(accuracy(classify, file, weights)), (alpha, name)
            seen.add(round(scores[name]["loss"], 6))
        assert scores.keys() == {"data", "shifted"}, "a classifier has no loss on a general text"
    assert len(seen) == 2 * len(ALPHAS), "every a is another model"
    for name in ("wise", "ev"):
        logs = "".join(file.read_text() for file in done.folder.stage(name).logs.glob("*.log"))
        assert "set forgetting: skipped, a classifier has no loss on a text" in logs, name


def test_the_chosen_classifier_is_proven_and_others_go_on_from_it(bench: Bench, done: Done) -> None:
    assert done.code == 0, done.told
    wise = done.folder.stage("wise")
    result, proof, curves = read_json(wise.result), read_json(wise.proof), read_json(wise.curves)
    assert result["artifact"]["kind"] == "classifier_model" and result["alpha"] == curves["chosen"]
    assert proof["reopened_loss"] == pytest.approx(result["scores"]["data"]["loss"], abs=1e-5)
    head, classify = (done.folder.stage(name).artifact / "model.safetensors" for name in ("head", "classify"))
    zero, one, chosen = load_file(head), load_file(classify), load_file(wise.artifact / "model.safetensors")
    for name, tensor in chosen.items():
        assert torch.allclose(tensor, torch.lerp(zero[name], one[name], result["alpha"]), rtol=0, atol=1e-6), name
    report = read_json(done.folder.stage("ev").artifact / "report.json")
    for name, scores in result["scores"].items():
        assert report["sets"][name]["accuracy"] == pytest.approx(scores["accuracy"])
        assert report["sets"][name]["loss"] == pytest.approx(scores["loss"], abs=1e-5)
    said = bench.run("blend", words=[str(done.folder.root), "--stage", "wise", "--prompt", "a red 7"], verb="generate")
    assert said.code == 0 and ("red 0." in said.out or "red 1." in said.out), said.told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["stages.wise.origin=null"], "stages.wise.origin: null is the base, which has no head for the classes of classify"),
        (["tuning=lora", "stages.head.tuning=null"], "classifiers are interpolated as whole models, and classify is tuned by lora"),
        (["stages.wise.exact_match=true"], "stages.wise.exact_match: classify is a classifier, which generates no answer"),
        (["stages.wise.options=[red,green]"], "stages.wise.options: classify is a classifier, whose options are its classes"),
        (["stages.ev.options=none"], "stages.ev.options: wise is a classifier, whose options are its classes; type auto"),
        (["stages.ev.start_from=null"], "stages.ev.start_from: null; it must be a stage before ev that makes"),
        (["stages.classify.problem=regression", "stages.wise.choose_by=accuracy"], "classify predicts a number, which has no accuracy"),
        (["pipeline=[head,classify,wise,merge]", "+stage@stages.merge=merge", "stages.merge.start_from=wise"], "it makes a classifier; there is none"),
        (["pipeline=[classify,wise]", "stages.classify.start_from=null"], "stages.wise.origin: head is not a stage of kind classify"),
    ],
)  # fmt: skip
def test_what_is_no_interpolation_of_classifiers_is_refused(bench: Bench, words: list[str], told: str) -> None:
    refused = bench.run("refused", words=blend_words(bench.root, "refused", *words), verb="plan")
    assert refused.code == 2 and told in refused.error, refused.told
