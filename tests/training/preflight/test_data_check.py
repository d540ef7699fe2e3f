"""The look before the spend: what `check` shows, what it refuses, and the two-layer copy."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_parts import CHATML, FAMILIES, data_config, write_jsonl, write_tokenizer
from rich.console import Console
from transformers import LlamaConfig, MixtralConfig, PreTrainedModel, Qwen3Config

from orchestrator.composition.compose import compose
from orchestrator.data.encoding.tokenizer import load_facts
from orchestrator.data.epoch import Epoch, epoch_of
from orchestrator.data.formats.examples import Chat
from orchestrator.data.order import make_order
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.errors import DataError, TrainingFailed
from orchestrator.models.small_copy import small_copy
from orchestrator.preflight.data_check import DataReport, Piece, check_data, decoded_pieces, document_faults, histogram
from orchestrator.preflight.data_report import histogram_lines, print_report, table_rows
from orchestrator.preflight.gradient_check import check_gradients

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]


def conversations(count: int) -> list[dict[str, Any]]:
    def words(i: int, n: int) -> str:
        return " ".join(WORDS[(i * 5 + k) % len(WORDS)] for k in range(1 + (i * 7) % n))

    return [
        {
            "messages": [
                {"role": "user", "content": f"Question {i}: {words(i, 9)}?"},
                {"role": "assistant", "content": f"{words(i, 13)} {i}."},
                {"role": "user", "content": f"And {words(i + 1, 5)}, number {i}?"},
                {"role": "assistant", "content": f"Well, {words(i + 2, 7)}.", "train": i % 3 != 0},
            ]
        }
        for i in range(count)
    ]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads of torch only wait for each other, long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(
    tmp_path: Path, rows: list[dict[str, Any]], *, family: str = "chatml", template: str | None = None, **changes: Any
) -> tuple[DataReport, PreparedRows]:
    tokenizer = write_tokenizer(tmp_path / "tokenizer", FAMILIES[family])
    if template is not None:
        (tokenizer / "chat_template.jinja").write_text(template)
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = data_config(train__path=str(data), **changes)
    stage = compose(["+experiment=llama_lora", "stages.sft.batch.global_size=8"]).stages["sft"]
    trained = stage.model_copy(update={"data": config})

    def epoch(rows: PreparedRows) -> Epoch:
        return epoch_of(trained, rows.rows, lambda: rows.lengths, seed=0)

    report, prepared = check_data(
        config, tokenizer_folder=tokenizer, cache=tmp_path / "cache", seed=0, epoch=epoch, say=lambda sentence: None
    )
    return report, PreparedRows.open(prepared.train)


@pytest.mark.parametrize("packing", ["none", "best_fit", "split"])
@pytest.mark.parametrize("loss_on", ["answers", "last_answer", "all"])
def test_good_rows_have_no_fault(tmp_path: Path, packing: str, loss_on: str) -> None:
    report, rows = check(tmp_path, conversations(300), packing=packing, loss_on=loss_on)
    assert report.faults == () and report.epoch == Epoch(steps=-(-rows.rows // 8), fillers=-rows.rows % 8)
    assert report.checked_rows == min(rows.rows, 220) or 200 <= report.checked_rows <= 220
    assert report.statistics.source_rows == 300 and report.evaluation_statistics is not None
    assert sum(count for _, _, count in report.histogram) == len(np.unique(rows.segment_documents))


def test_steps_under_a_token_budget_are_those_that_training_takes(tmp_path: Path) -> None:
    report, rows = check(tmp_path, conversations(100), tokens_per_batch=256, max_length=256)
    order = make_order(data_config(tokens_per_batch=256, max_length=256), lengths=rows.lengths, global_size=8, seed=0)
    assert report.epoch is not None and report.epoch.steps == order.steps_per_epoch
    assert report.epoch.steps < -(-rows.rows // 8)


def test_rows_are_shown_with_the_trained_tokens_marked(tmp_path: Path) -> None:
    report, _ = check(tmp_path, conversations(30), eval__path="none")
    assert len(report.shown) == 3
    plain, colour = io.StringIO(), io.StringIO()
    print_report(report, Console(file=plain, width=200))
    print_report(report, Console(file=colour, width=200, force_terminal=True))
    number = int(report.shown[0].where.rpartition(":")[2]) - 1
    answer = conversations(30)[number]["messages"][1]["content"]
    assert f"<|im_start|>assistant\n⟦{answer}<|im_end|>⟧\n" in plain.getvalue()
    assert "⟦" not in colour.getvalue() and "\x1b[1;32m" in colour.getvalue()
    for name, value in table_rows(report):
        assert name in plain.getvalue() and value in plain.getvalue()
    assert any("█" in line for line in histogram_lines(report))


def test_preferences_and_plain_text(tmp_path: Path) -> None:
    pairs = [
        {"prompt": f"Say {i}, please:", "chosen": f" yes {i} of course", "rejected": f" no {i} never"}
        for i in range(30)
    ]
    for packing in ("none", "best_fit"):
        report, _ = (
            check(tmp_path / packing, pairs, packing=packing) if (tmp_path / packing).mkdir() is None else (None, None)
        )
        assert report is not None and report.faults == ()


def test_a_template_that_does_not_close_turns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        check(tmp_path, conversations(20), template=CHATML.replace("+ '<|im_end|>' + '\n'", "+ '\n'"))
    problems = caught.value.problems
    assert (
        problems[0].endswith("has an answer whose end is not trained [untrained_turn_end]")
        and "rows.jsonl:2 " in problems[0]
    )
    assert any(problem.startswith("[untrained_turn_end] the template closes") for problem in problems)


def test_roles_in_a_wrong_order_and_two_beginnings(tmp_path: Path) -> None:
    rows = conversations(4)
    rows[1]["messages"].insert(0, {"role": "user", "content": "again"})
    rows[2]["messages"][0]["content"] = "<s>" + rows[2]["messages"][0]["content"]
    with pytest.raises(
        DataError, match=r"rows.jsonl:2 messages are refused by the chat template: Conversation roles must alternate"
    ):
        check(tmp_path, rows, family="llama2", eval__path="none")
    template = "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    with pytest.raises(DataError, match=r"starts with two beginning-of-text tokens \[double_bos\]"):
        check(tmp_path, conversations(4), family="llama2", template=template, eval__path="none")


def faults_of(learnt: list[tuple[str, bool]], tmp_path: Path) -> set[str]:
    """The codes of what `check` says of pieces that were prepared wrongly."""
    facts = load_facts(write_tokenizer(tmp_path / "t", FAMILIES["chatml"]))
    messages = (
        {"role": "user", "content": "What is the quick brown fox?"},
        {"role": "assistant", "content": "It is an animal."},
    )
    chat = Chat(messages, None, (False, True))
    pieces = [Piece(text, trained) for text, trained in learnt]
    return {code for code, _ in document_faults(chat, pieces, [5, 6, 7], facts, data_config())}


def test_wrongly_prepared_rows_would_be_seen(tmp_path: Path) -> None:
    """`check` does not trust the code that made the rows: each way to be wrong has its code."""
    question, answer = "user\nWhat is the quick brown fox?<|im_end|>", "It is an animal."
    assert faults_of([(question, False), (f"{answer}<|im_end|>", True)], tmp_path) == set()
    assert faults_of([(question + answer, False)], tmp_path) == {"zero_trained_tokens"}
    assert faults_of([(question, False), (answer, True), ("<|im_end|>", False)], tmp_path) == {"untrained_turn_end"}
    assert faults_of([(question + answer + "<|im_end|>", True)], tmp_path) == {"trained_prompt"}
    assert faults_of([(question + "It is an ", False), ("ani<|im_end|>", True)], tmp_path) == {"changed_answer"}


def test_pieces_and_histogram(tmp_path: Path) -> None:
    facts = load_facts(write_tokenizer(tmp_path / "t", FAMILIES["chatml"]))
    pieces = decoded_pieces([1, 2, 1, 2], [False, True, True, False], facts)
    assert [(piece.text, piece.trained) for piece in pieces] == [
        ("<|im_start|>", False),
        ("<|im_end|><|im_start|>", True),
        ("<|im_end|>", False),
    ]
    bars = histogram([1, 3, 4, 5, 900, 1024])
    assert bars[-1] == (513, 1024, 2) and sum(count for _, _, count in bars) == 6 and bars[0][0] == 1
    assert histogram([]) == ()


# --- the two-layer copy ------------------------------------------------------------------------------------------------


def with_lora(model: PreTrainedModel) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.requires_grad_(False)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))


def with_reentrant_checkpointing(model: PreTrainedModel) -> torch.nn.Module:
    """Frozen embeddings under reentrant checkpointing: nothing that is trained sees an input with a gradient."""
    model.requires_grad_(False)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    if hasattr(model, "disable_input_require_grads"):
        model.disable_input_require_grads()
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    return model


CONFIGS = {
    "llama": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128_256,
    ),
    "qwen3": Qwen3Config(
        hidden_size=4096,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151_936,
    ),
    "mixtral": MixtralConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", CONFIGS)
def test_every_trained_tensor_of_a_copy_learns(tmp_path: Path, name: str) -> None:
    _, rows = check(tmp_path, conversations(20), packing="best_fit", eval__path="none")
    CONFIGS[name].save_pretrained(tmp_path / "base")
    copy = small_copy(tmp_path / "base", attention="sdpa")
    assert len(copy.model.layers) == 2 and sum(p.numel() for p in copy.parameters()) < 5_000_000
    batch = rows.batch([0])
    full = check_gradients(tmp_path / "base", batch, lambda model: model)
    adapters = check_gradients(tmp_path / "base", batch, with_lora)
    assert full == sum(1 for _ in copy.parameters()) and adapters >= 16


@pytest.mark.filterwarnings("ignore")
def test_adapters_without_gradients_are_refused(tmp_path: Path) -> None:
    """Reentrant checkpointing over frozen embeddings: the classic way to train nothing."""
    _, rows = check(tmp_path, conversations(20), eval__path="none")
    CONFIGS["llama"].save_pretrained(tmp_path / "base")
    with pytest.raises(TrainingFailed, match=r"1 of 1 trained tensors get no gradient .*gradient_checkpointing=false"):
        check_gradients(tmp_path / "base", rows.batch([0]), with_reentrant_checkpointing)
    with pytest.raises(TrainingFailed, match="trains no parameter"):
        check_gradients(tmp_path / "base", rows.batch([0]), lambda model: model.requires_grad_(False))


def test_an_untouched_tensor_is_named(tmp_path: Path) -> None:
    _, rows = check(tmp_path, conversations(20), eval__path="none")
    CONFIGS["llama"].save_pretrained(tmp_path / "base")

    def with_orphan(model: PreTrainedModel) -> torch.nn.Module:
        model.register_parameter("orphan", torch.nn.Parameter(torch.zeros(2)))
        return model

    with pytest.raises(TrainingFailed, match=r"1 of \d+ trained tensors get no gradient \(orphan\)"):
        check_gradients(tmp_path / "base", rows.batch([0]), with_orphan)
