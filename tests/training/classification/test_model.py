"""Classifiers in this process: tokens, answers, targets and parameter groups, against transformers' own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_model
import torch
from classification_runs import ENCODERS, colours, write_decoder, write_encoder, write_labelled

from orchestrator.classification.classes import Classes, targets_of
from orchestrator.classification.model import document_answers, load_classifier
from orchestrator.classification.objective import classify_objective
from orchestrator.classification.report import judged
from orchestrator.classification.self_training import self_training_objective
from orchestrator.composition.compose import compose
from orchestrator.config.run import RunConfig
from orchestrator.data.encoding.answer_spans import NotRendered
from orchestrator.data.encoding.labelled_text import encode_labelled
from orchestrator.data.encoding.tokenizer import load_facts
from orchestrator.data.formats.examples import Labelled
from orchestrator.data.preparation.prepare import ensure_prepared
from orchestrator.dataloader.batch import Batch, batch_of
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.distributed.runtime import Runtime, start_single_runtime
from orchestrator.errors import CheckpointError, ConfigError, DataError
from orchestrator.models.tuning import apply_tuning
from orchestrator.training.optimizer import RATE, parameter_groups

CLASSES = Classes(problem="single_label", names=("red", "green", "blue"))
TEXTS = ["a red stone", "blue", "green river and seven clouds"]
PAIRS = ["is it red", "no", "yes it is"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("classifier")
    tiny_model.write_llama(root / "llama")
    for family in ENCODERS:
        write_encoder(root / family, family)
    return root


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return start_single_runtime(compose(["+experiment=llama_classify", "model.dtype=float32"]), autocast=False)


def config_of(folder: Path, *words: str) -> RunConfig:
    return compose(["+experiment=llama_classify", f"model.base={folder}", "model.dtype=float32", *words])


def classifier(folder: Path, classes: Classes = CLASSES, *words: str) -> torch.nn.Module:
    torch.manual_seed(1)
    return load_classifier(folder, config_of(folder, *words), classes, weights_dtype=torch.float32, packed=False).eval()


def batch_from(folder: Path, documents: list[Labelled]) -> Batch:
    facts = load_facts(folder)
    ids = [np.array(encode_labelled(document, facts, 64)[0]) for document in documents]
    return batch_of(
        [(one, np.zeros(len(one), dtype=np.bool_)) for one in ids], list(range(len(ids))), pad_id=facts.pad_id
    )


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("pairs", [False, True])
def test_encoders_answer_as_transformers_does(runtime: Runtime, root: Path, family: str, pairs: bool) -> None:
    """Through its tokenizer and its class alone, padded and one by one."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = classifier(root / family)
    model.save_pretrained(root / f"{family}-saved")  # type: ignore[operator]
    theirs, report = AutoModelForSequenceClassification.from_pretrained(
        root / f"{family}-saved", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert theirs.config.id2label == dict(enumerate(CLASSES.names))
    tokenizer = AutoTokenizer.from_pretrained(root / family)
    seconds = PAIRS if pairs else None
    inputs = tokenizer(TEXTS, seconds, padding=True, return_tensors="pt", return_token_type_ids=family == "bert")
    with torch.no_grad():
        expected_DC = theirs.eval()(**inputs).logits
        batch = batch_from(root / family, [Labelled(text, PAIRS[i] if pairs else None) for i, text in enumerate(TEXTS)])
        found_DC, features_DW = document_answers(runtime, model, batch)
        alone_DC = torch.cat(
            [
                document_answers(
                    runtime, model, batch_from(root / family, [Labelled(text, PAIRS[i] if pairs else None)])
                )[0]
                for i, text in enumerate(TEXTS)
            ]
        )
    assert features_DW.shape == (3, 32)
    assert torch.allclose(found_DC, expected_DC, atol=1e-5) and torch.allclose(found_DC, alone_DC, atol=1e-5)
    assert (found_DC[0] - found_DC[1]).abs().max() > 1e-3


def test_decoders_answer_as_transformers_does(runtime: Runtime, root: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = classifier(root / "llama")
    model.save_pretrained(root / "llama-saved")  # type: ignore[operator]
    theirs = AutoModelForSequenceClassification.from_pretrained(root / "llama-saved").eval()
    inputs = AutoTokenizer.from_pretrained(root / "llama")(
        TEXTS, padding=True, padding_side="right", return_tensors="pt", return_token_type_ids=False
    )
    with torch.no_grad():
        expected_DC = theirs(**inputs).logits
        found_DC, _ = document_answers(
            runtime, model, batch_from(root / "llama", [Labelled(text, None) for text in TEXTS])
        )
    assert torch.allclose(found_DC, expected_DC, atol=1e-5) and (found_DC[0] - found_DC[1]).abs().max() > 1e-3


def test_texts_are_encoded_cut_and_refused(root: Path) -> None:
    from transformers import AutoTokenizer

    facts, tokenizer = load_facts(root / "bert"), AutoTokenizer.from_pretrained(root / "bert")
    pair = Labelled("one red apple on a stone", "seven")
    for length in (64, 20):
        wanted = tokenizer(pair.text, pair.pair, truncation="longest_first", max_length=length)["input_ids"]
        found, cut = encode_labelled(pair, facts, length)
        assert found == wanted and cut == len(tokenizer(pair.text, pair.pair)["input_ids"]) - len(wanted)
    with pytest.raises(NotRendered, match=r"holds \[SEP\], the tokenizer's own separator"):
        encode_labelled(Labelled("red [SEP] blue", None), facts, 64)
    plain = load_facts(root / "llama")
    assert encode_labelled(pair, plain, 64) == encode_labelled(Labelled(f"{pair.text}\n\n{pair.pair}", None), plain, 64)


@pytest.mark.parametrize("family", ["llama", *ENCODERS])
def test_lora_saves_every_new_weight(root: Path, family: str) -> None:
    """What the base's folder does not hold must come with the adapter: a pooler, a dense layer before the head, the head."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    model = apply_tuning(classifier(root / family), config_of(root / family), task="SEQ_CLS")  # type: ignore[arg-type]
    with safe_open(root / family / "model.safetensors", framework="pt") as base:
        known = set(base.keys())
    saved = {name.removeprefix("base_model.model.") for name in get_peft_model_state_dict(model)}
    new = {name for name, _ in classifier(root / family).named_parameters() if name not in known}
    assert (
        new
        and new <= saved
        and not any("lora_" in name for name in saved if name.split(".lora_")[0] + ".weight" in new)
    )
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == len(saved)


def test_the_head_has_a_rate_of_its_own(root: Path) -> None:
    stage = config_of(root / "bert", "stages.classify.optimizer={lr: 1e-4, head_lr: 1e-3, layer_decay: 0.5}").stages[
        "classify"
    ]
    named = dict(classifier(root / "bert").named_parameters())
    groups = parameter_groups(named.items(), stage.optimizer)  # type: ignore[union-attr]
    rates = {
        name: group[RATE] for group in groups for own in group["params"] for name, one in named.items() if one is own
    }
    assert all(group["params"] for group in groups) and len(rates) == len(named)
    assert {name for name, rate in rates.items() if rate == pytest.approx(10.0)} == {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"
    }  # fmt: skip
    assert rates["bert.encoder.layer.1.output.dense.weight"] == pytest.approx(0.5)
    assert rates["bert.encoder.layer.0.output.dense.weight"] == pytest.approx(0.25)
    body = [(name, one) for name, one in named.items() if "encoder" in name]
    with pytest.raises(ConfigError, match=r"optimizer\.head_lr: no separate head is trained"):
        parameter_groups(body, stage.optimizer)  # type: ignore[union-attr]


def prepared(root: Path, rows: list[dict[str, object]], *words: str) -> PreparedRows:
    name = f"rows-{abs(hash(json.dumps(rows)))}.jsonl"
    config = config_of(
        root / "llama",
        f"stages.classify.data.train.path={write_labelled(root / name, rows)}",
        "stages.classify.data.eval.path=none",
        *words,
    )
    data = config.stages["classify"].data
    made = ensure_prepared(data, tokenizer_folder=root / "llama", cache=root / "cache", seed=0, say=print)
    return PreparedRows.open(made.train)


def test_labels_become_targets_by_name_and_by_place(root: Path) -> None:
    rows = prepared(
        root, [{"text": f"t{i}", "label": label} for i, label in enumerate(["blue", "red", "green", "red"])]
    )
    assert rows.meta.classes == ("blue", "green", "red")
    assert targets_of(rows, CLASSES).of_D.tolist() == [2, 0, 1, 0]
    numbers = prepared(root, [{"text": f"t{i}", "label": label, "right": 1} for i, label in enumerate([2, 0, 10])],
                       "stages.classify.data.train.columns={true_label: right}")  # fmt: skip
    assert numbers.meta.classes == ("0", "2", "10")
    found = targets_of(numbers, Classes(problem="single_label", names=("0", "2", "10")))
    assert found.of_D.tolist() == [1, 0, 2] and found.true_D.tolist() == [1, 1, 1]
    with pytest.raises(DataError, match="line 3: 10 is none of the classes red, green, blue"):
        targets_of(numbers, CLASSES)
    sets = prepared(root, [{"text": "a", "label": ["red", "blue"]}, {"text": "b", "label": []}])
    several = targets_of(sets, Classes(problem="multi_label", names=CLASSES.names))
    assert several.of_D.tolist() == [[1, 0, 1], [0, 0, 0]] and several.has_label_D.all()
    measured = prepared(root, [{"text": "a", "label": -1.5}, {"text": "b", "label": 2}])
    assert targets_of(measured, Classes(problem="regression", names=())).of_D.tolist() == [-1.5, 2.0]


def test_rows_without_a_label_are_refused_dropped_or_kept(root: Path) -> None:
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": -1}, {"text": "c"}, {"text": "d", "label": 0}]
    with pytest.raises(DataError) as refused:
        prepared(root, rows)
    told = " ".join(refused.value.problems)
    assert ":2" in told and ":3" in told and "unlabelled=drop leaves such rows out" in told
    dropped = prepared(root, rows, "stages.classify.data.train.unlabelled=drop")
    assert dropped.rows == 2 and dropped.meta.statistics.dropped == {"dropped_unlabelled": 2}
    other = prepared(root, rows[:2], "stages.classify.data.train.no_label=null")
    assert other.meta.classes == ("-1", "1")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_packed_rows_have_the_loss_of_single_ones(runtime: Runtime, root: Path, family: str) -> None:
    """Each text is read at its own end, and sees no other."""
    base = root / family if family == "llama" else write_decoder(root / family, family)
    given = colours(0, 12)
    losses, counts = [], []
    for packing in ("none", "best_fit"):
        rows = prepared(root, given, f"stages.classify.data.packing={packing}", "stages.classify.data.max_length=96")
        config = config_of(base)
        torch.manual_seed(1)
        model = load_classifier(base, config, CLASSES, weights_dtype=torch.float32, packed=rows.is_packed).eval()
        objective = classify_objective(runtime, CLASSES, {rows.digest: targets_of(rows, CLASSES)})
        with torch.no_grad():
            losses.append(objective.terms(model, rows.batch(range(rows.rows)))[0].item())
        counts.append((rows.rows, objective.weight(rows, range(rows.rows))))
    assert counts[0] == (12, 12.0) and counts[1][0] < 12 and counts[1][1] == 12.0
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    with pytest.raises(Exception, match="packed texts would see each other"):
        load_classifier(root / "bert", config_of(root / "bert"), CLASSES, weights_dtype=torch.float32, packed=True)


def test_the_self_training_loss_is_the_sum_of_its_parts(runtime: Runtime, root: Path) -> None:
    from orchestrator.losses.classification import contrastive_loss, divergence_D, uniform_divergence_D

    config = compose(["+experiment=llama_weak_supervision"])
    stage = config.stages["self_training"].model_copy(update={"contrastive_weight": 0.7, "confidence_weight": 0.3})
    model = classifier(root / "llama")
    batch = batch_from(root / "llama", [Labelled(text, None) for text in [*TEXTS, "red"]])
    labels_DC = torch.tensor([[0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.34, 0.33, 0.33], [0.05, 0.05, 0.9]])
    weights_D = torch.tensor([0.7, 0.6, 0.0, 0.8])
    objective = self_training_objective(runtime, stage, lambda _: (labels_DC, weights_D))  # type: ignore[arg-type]
    with torch.no_grad():
        loss = objective.terms(model, batch)[0]
        logits_DC, features_DW = document_answers(runtime, model, batch)
    kept = [0, 1, 3]
    expected = (weights_D * divergence_D(labels_DC, logits_DC)).sum()
    expected += 0.7 * 4 * contrastive_loss(features_DW[kept], torch.tensor([0, 1, 2]), margin=stage.margin)  # type: ignore[union-attr]
    expected += 0.3 * uniform_divergence_D(logits_DC)[kept].sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_folder_without_its_head_is_no_trained_classifier(root: Path) -> None:
    config = config_of(root / "llama")
    with pytest.raises(CheckpointError, match=r"no weights of score\.weight"):
        load_classifier(root / "llama", config, CLASSES, weights_dtype=torch.float32, packed=False, may_be_new=False)


def test_only_labelled_rows_are_judged(root: Path) -> None:
    rows = prepared(
        root, [{"text": "a", "label": "red"}, {"text": "b", "label": None}, {"text": "c", "label": "blue"}],
        "stages.classify.data.train.unlabelled=drop",
    )  # fmt: skip
    targets = targets_of(rows, CLASSES)
    logits_DC = torch.tensor([[5.0, 0.0, 0.0], [5.0, 0.0, 0.0]])
    loss, measures, report = judged(logits_DC, targets, CLASSES)
    assert measures["accuracy"] == 0.5 and report["rows"] == 2 and report["confusion"][2] == [1, 0, 0]
    assert loss == pytest.approx(
        (-torch.log_softmax(logits_DC[0], 0)[0] - torch.log_softmax(logits_DC[0], 0)[2]).item() / 2
    )
