"""Whole runs of classifiers through the command line: what they leave is proven, told, and opened by others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bench import Bench, Done, make_bench
from classification_runs import colours, words_of, write_encoder, write_labelled, write_sets
from loading_code import check_scripts

from orchestrator.files.atomic import read_json
from orchestrator.metrics.jsonl import read_rows
from orchestrator.run_folder.folder import StageFolder

NAMES = {0: "blue", 1: "green", 2: "red"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = make_bench(tmp_path_factory.mktemp("classify_runs"))
    write_sets(bench.root)
    write_encoder(bench.root / "bert", "bert")
    return bench


@pytest.fixture(scope="module")
def weak(bench: Bench) -> Done:
    """Weak labels with early stopping, then self-training from it, on two ranks under ZeRO-2."""
    words = (
        "sharding=zero2",
        "cluster.processes_per_node=2",
        "launcher=torchrun",
        "tuning.layers=all",
        "stages.classify.max_steps=12",
        "stages.classify.evaluate_every_steps=4",
        "stages.self_training.evaluate_every_steps=3",
        "stages.self_training.period=3",
        "stages.self_training.threshold=0.1",
    )
    return bench.run("weak", words=words_of(bench.root, "weak", *words, experiment="llama_weak_supervision"))


def accuracy(model: torch.nn.Module, tokenizer: object, rows: list[dict[str, object]]) -> float:
    """By transformers alone, one text at a time."""
    right = 0
    for row in rows:
        inputs = tokenizer(str(row["text"]), return_tensors="pt", return_token_type_ids=False)  # type: ignore[operator]
        with torch.no_grad():
            number = int(model(**inputs).logits.argmax())
        right += model.config.id2label[number] == row["label"]  # type: ignore[index, union-attr]
    return right / len(rows)


def test_weak_supervision_end_to_end(bench: Bench, weak: Done) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    assert weak.code == 0, weak.told
    first, second = (read_json(weak.folder.stage(name).result) for name in ("classify", "self_training"))
    assert first["artifact"]["kind"] == second["artifact"]["kind"] == "classifier_model"
    assert first["eval_loss_after"] < first["eval_loss_before"]
    assert second["eval_loss_before"] == pytest.approx(first["eval_loss_after"], abs=1e-5), "it goes on from it"
    given = colours(0, 48)
    known = [row for row in given if row["weak"] is not None]
    assert second["weak_labels"]["coverage"] == pytest.approx(len(known) / 48)
    assert second["weak_labels"]["accuracy"] == pytest.approx(
        sum(row["weak"] == row["label"] for row in known) / len(known)
    )
    assert [told["step"] for told in second["pseudo_labels"]] == [1, 4]
    assert 0 < second["pseudo_labels"][0]["share_kept"] <= 1
    folder = weak.folder.stage("self_training").artifact
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert model.config.id2label == NAMES
    held = second["classification"]["held_out"]
    theirs = accuracy(model, AutoTokenizer.from_pretrained(folder), colours(1000, 15))
    assert theirs == pytest.approx(held["accuracy"]) and sum(map(sum, held["confusion"])) == held["rows"] == 15
    told = [row for row in read_rows(weak.folder.stage("classify").metrics) if "eval_mcc" in row]
    assert {int(str(row["step"])) for row in told} >= {0, 4, 8, 12} and "eval_f1_macro" in told[0]
    assert read_json(weak.folder.stage("classify").prepared)["train"]
    assert "true \\ predicted" in weak.out and "f1_macro" in weak.out
    check_scripts(weak.folder.stage("self_training"), weak.out)


def test_self_training_that_would_train_nothing_is_refused(bench: Bench) -> None:
    words = (
        "tuning.layers=all",
        "stages.classify.max_steps=2",
        "stages.self_training.threshold=0.999",
        "launcher=local",
    )
    done = bench.run("unsure", words=words_of(bench.root, "unsure", *words, experiment="llama_weak_supervision"))
    assert done.code == 2, done.told
    assert "stages.self_training.threshold: 0.999, but the most confident pseudo-label has" in " ".join(
        done.told.split()
    )
    assert not done.folder.stage("self_training").result.exists()


def test_generate_names_the_classes_and_export_refuses(bench: Bench, weak: Done) -> None:
    said = bench.run("weak", words=[str(weak.folder.root), "--examples", "2"], verb="generate")
    assert said.code == 0, said.told
    lines = said.out.strip().splitlines()
    assert len(lines) == 2 and all(
        any(f"{name} 0." in line or f"{name} 1." in line for name in NAMES.values()) for line in lines
    )
    refused = bench.run("weak", words=[str(weak.folder.root)], verb="export")
    assert refused.code == 2 and "the stages that make a policy are none" in refused.told


def test_an_adapter_on_an_encoder_is_opened_by_the_words_that_are_printed(bench: Bench) -> None:
    """LoRA, pairs of texts, several labels at once: the pooler and the head come with the adapter."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    rows = [{"text": row["text"], "text_pair": "which", "label": [row["label"], "any"] if number % 2 else [row["label"]]}
            for number, row in enumerate(colours(0, 63))]  # fmt: skip
    write_labelled(bench.root / "sets.jsonl", rows[:48])
    held = write_labelled(bench.root / "held_out_sets.jsonl", rows[48:])
    words = words_of(
        bench.root, "sets", f"stages.classify.data.train.path={bench.root / 'sets.jsonl'}", f"stages.classify.data.eval.path={held}",
        "stages.classify.problem=multi_label", base="bert",
    )  # fmt: skip
    done = bench.run("sets", words=words)
    assert done.code == 0, done.told
    stage = done.folder.stage("classify")
    result = read_json(stage.result)
    assert result["artifact"]["kind"] == "classifier_adapter"
    config = AutoConfig.from_pretrained(stage.artifact)
    assert config.problem_type == "multi_label_classification" and list(config.id2label.values()) == [
        "any",
        "blue",
        "green",
        "red",
    ]
    base = AutoModelForSequenceClassification.from_pretrained(bench.root / "bert", config=config)
    model = PeftModel.from_pretrained(base, str(stage.artifact)).eval()
    tokenizer = AutoTokenizer.from_pretrained(stage.artifact)
    inputs = tokenizer(
        [str(row["text"]) for row in rows[48:]],
        ["which"] * 15,
        padding=True,
        return_tensors="pt",
        return_token_type_ids=True,
    )
    with torch.no_grad():
        said = model(**inputs).logits > 0
    wanted = torch.tensor([[name in row["label"] for name in config.id2label.values()] for row in rows[48:]])  # type: ignore[operator]
    assert float((said == wanted).float().mean()) == pytest.approx(
        result["classification"]["held_out"]["accuracy_of_labels"]
    )
    check_scripts(stage, done.out)


def test_a_number_is_predicted_from_a_base_in_4_bits(bench: Bench) -> None:
    numbers = [{"text": row["text"], "label": len(str(row["text"])) / 10 - 1} for row in colours(0, 63)]
    write_labelled(bench.root / "numbers.jsonl", numbers[:48])
    held = write_labelled(bench.root / "held_out_numbers.jsonl", numbers[48:])
    words = words_of(
        bench.root, "numbers", f"stages.classify.data.train.path={bench.root / 'numbers.jsonl'}", f"stages.classify.data.eval.path={held}",
        "stages.classify.problem=regression", "stages.classify.data.train.no_label=null", "stages.classify.data.eval.no_label=null",
        "quantization=nf4", "stages.classify.max_steps=20", "stages.classify.optimizer.head_lr=2e-2",
    )  # fmt: skip
    done = bench.run("numbers", words=words)
    assert done.code == 0, done.told
    result = read_json(done.folder.stage("classify").result)
    held_out = result["classification"]["held_out"]
    assert (
        held_out["mse"] == pytest.approx(result["eval_loss_after"], rel=1e-6)
        and held_out["mse"] < result["eval_loss_before"]
    )
    assert {"mae", "pearson", "spearman"} <= held_out.keys()
    saved = json.loads((_artifact(done) / "config.json").read_text())
    assert saved["problem_type"] == "regression" and "quantization_config" not in saved


def _artifact(done: Done) -> Path:
    stage: StageFolder = done.folder.stage("classify")
    return stage.artifact


def test_a_classifier_is_scored_on_sets_in_and_out_of_distribution(bench: Bench) -> None:
    """The held-out rows as first set give what training told of them; a set of wrong labels gives what is left of them."""
    wrong = [
        {**row, "label": {"red": "green", "green": "blue", "blue": "red"}[str(row["label"])]}
        for row in colours(1000, 15)
    ]
    write_labelled(bench.root / "shifted.jsonl", wrong)
    words = words_of(
        bench.root,
        "scored",
        "pipeline=[classify,evaluate]",
        "+stage@stages.evaluate=evaluate",
        f"stages.evaluate.data.train.path={bench.root / 'held_out_colours.jsonl'}",
        "stages.evaluate.data.train.format=classification",
        f"stages.evaluate.sets={{shifted: {{path: {bench.root / 'shifted.jsonl'}, shift: true}}}}",
        "stages.classify.max_steps=20",
    )
    done = bench.run("scored", words=words)
    assert done.code == 0, done.told
    held_out = read_json(done.folder.stage("classify").result)["classification"]["held_out"]
    sets = read_json(done.folder.stage("evaluate").result)["sets"]
    assert sets["data"]["accuracy"] == pytest.approx(held_out["accuracy"]) and not sets["data"]["shift"]
    assert sets["data"]["confusion"] == held_out["confusion"]
    assert sets["shifted"]["shift"] and sets["shifted"]["accuracy"] <= 1 - sets["data"]["accuracy"] + 1e-6
    assert sets["data"]["commonest_class"] == pytest.approx(5 / 15)
    assert read_json(done.folder.stage("evaluate").artifact / "report.json")["sets"] == sets
