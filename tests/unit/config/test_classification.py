"""What a classifier's settings, pipeline and base must be: refused with a sentence before anything starts; no torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Asker

from orchestrator.architecture.read import read_architecture
from orchestrator.composition.compose import compose
from orchestrator.config.pipeline import resolve_starts
from orchestrator.config.run import has_new_heads
from orchestrator.config.tuning import FreezeTuning
from orchestrator.data.formats.examples import Labelled, Reading, RowProblem
from orchestrator.data.formats.parse import parse_row
from orchestrator.estimate.model_states import trainable_parameters

BERT = {
    "model_type": "bert", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "type_vocab_size": 2,
}  # fmt: skip
CLASSIFY = ("plan", "+experiment=llama_classify")
WEAK = ("plan", "+experiment=llama_weak_supervision")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((*CLASSIFY, "stages.classify.data.packing=split"), "split would cut a text"),
        (
            (*CLASSIFY, "stages.classify.data.train.unlabelled=keep"),
            "stage=classify learns from labels alone; type drop",
        ),
        ((*CLASSIFY, "stages.classify.data.eval.unlabelled=keep"), "a row without a label cannot be scored"),
        ((*CLASSIFY, "stages.classify.labels=[a,b,a]"), "stages.classify.labels: a name appears twice"),
        ((*CLASSIFY, "stages.classify.labels=[a]"), "one class of ['a'] is always right"),
        (
            (*CLASSIFY, "stages.classify.labels=[a,b]", "stages.classify.problem=regression"),
            "predicts a number and has no classes; type stages.classify.labels=null",
        ),
        ((*WEAK, "stages.self_training.data.eval.path=none"), "it is unknown whether self-training helps"),
        (
            (*WEAK, "pipeline=[self_training]"),
            "no stage before self_training makes a classifier; add one to the pipeline, such as classify",
        ),
    ],
)
def test_what_cannot_work_is_refused(ask: Asker, words: tuple[str, ...], sentence: str) -> None:
    told = " ".join(ask.refused(*words))
    assert sentence in told, told


def test_a_classifier_is_no_policy_and_self_training_finds_it() -> None:
    config = resolve_starts(compose(["+experiment=llama_weak_supervision"]))
    assert (config.stages["classify"].start_from, config.stages["self_training"].start_from) == (None, "classify")
    assert has_new_heads(config) and not has_new_heads(compose(["+experiment=llama_lora"]))


def write_base(folder: Path, **changes: object) -> Path:
    folder.mkdir()
    settings = {key: value for key, value in (BERT | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_an_encoder_classifies_single_rows_and_does_nothing_else(ask: Asker, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", model_type="roberta")
    told = " ".join(ask.refused("plan", "+experiment=llama_lora", f"model.base={base}"))
    assert f"stages.sft: {base} is an encoder, which sft cannot train; take stage=classify" in told
    told = " ".join(ask.refused(*CLASSIFY, f"model.base={base}", "stages.classify.data.packing=best_fit"))
    assert "in which packed texts would see each other; type stages.classify.data.packing=none" in told


def test_relatives_of_bert_are_forecast_and_strangers_are_not(tmp_path: Path) -> None:
    old = {"model_type": "distilbert", "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
    gone = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    plain = read_architecture(write_base(tmp_path / "bert"))
    distil = read_architecture(write_base(tmp_path / "distil", **old, **dict.fromkeys(gone)))
    assert plain is not None and plain.model_type == "bert"
    assert distil is not None and (distil.model_type, distil.num_hidden_layers) == ("bert", 2)
    assert read_architecture(write_base(tmp_path / "stranger", model_type="deberta-v2")) is None


def test_the_forecast_counts_a_new_head_in_the_place_of_the_old() -> None:
    config = compose(["+experiment=llama_classify", "tuning=freeze", "tuning.layers=none"])
    assert isinstance(config.tuning, FreezeTuning) and config.model.preset is not None
    assert trainable_parameters(config.model.preset.architecture, config) == 576


def test_labels_are_numbers_names_or_lists() -> None:
    row = {"text": "t", "text_pair": "u", "label": ["a", 2], "true_label": "b"}
    example = parse_row(row, "classification", {})
    assert example.documents == (Labelled("t", "u"),)
    assert json.loads(example.extra or "") == {"label": ["a", 2], "true_label": "b"}
    assert parse_row({"q": "t", "y": 1}, "classification", {"text": "q", "label": "y"}).value == 1.0
    both = parse_row({"text": "t", "weak": 0, "label": 3}, "classification", {"label": "weak", "true_label": "label"})
    assert json.loads(both.extra or "") == {"label": 0, "true_label": 3}
    for label in (True, {"a": 1}, [["a"]]):
        with pytest.raises(RowProblem, match="a class"):
            parse_row({"text": "t", "label": label}, "classification", {})


@pytest.mark.parametrize(
    "row", [{"text": "t"}, {"text": "t", "label": None}, {"text": "t", "label": ""}, {"text": "t", "label": -1}]
)
def test_a_row_without_a_label(row: dict[str, object]) -> None:
    def reading(unlabelled: str) -> Reading:
        return Reading(format="classification", columns={}, unlabelled=unlabelled, no_label=-1)  # type: ignore[arg-type]

    kept = parse_row(row, "classification", {}, labels=reading("keep"))
    assert json.loads(kept.extra or "") == {"label": None}
    codes = {}
    for unlabelled in ("refuse", "drop"):
        with pytest.raises(RowProblem, match="unlabelled=drop leaves such rows out") as problem:
            parse_row(row, "classification", {}, labels=reading(unlabelled))
        codes[unlabelled] = problem.value.code
    assert codes == {"refuse": "unlabelled", "drop": "unlabelled_dropped"}
