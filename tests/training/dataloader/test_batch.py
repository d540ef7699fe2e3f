"""Batches of prepared rows against the documents they hold, and packed rows against unpacked ones on every attention path."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_parts import FAMILIES, data_config, write_jsonl, write_tokenizer
from torch.nn.functional import cross_entropy, log_softmax
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from orchestrator.classification.classes import Classes, targets_of
from orchestrator.data.preparation.prepare import ensure_prepared
from orchestrator.dataloader.batch import Batch
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.errors import ConfigError
from orchestrator.losses.token_logprobs import IGNORED
from orchestrator.models import attention, attention_blocks

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]


def sentence(i: int, longest: int) -> str:
    return " ".join(WORDS[(i * 5 + k) % len(WORDS)] for k in range(1 + (i * 7) % longest))


SFT = [{"instruction": f"{i} {sentence(i, 12)}", "output": sentence(i + 3, 17)} for i in range(40)]
PAIRS = [
    {
        "prompt": f"{i} {sentence(i, 9)}",
        "chosen": " yes " + sentence(i, 11),
        "rejected": " no " + sentence(i + 1, 7),
        "margin": i / 8,
    }
    for i in range(24)
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads of torch only wait for each other, long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows")
    write_tokenizer(path / "tokenizer", FAMILIES["chatml"])
    write_jsonl(path / "sft.jsonl", SFT)
    write_jsonl(path / "pairs.jsonl", PAIRS)
    return path


def prepared(folder: Path, name: str, **changes: Any) -> PreparedRows:
    settings: dict[str, Any] = {
        "train__path": str(folder / f"{name}.jsonl"),
        "eval__path": "none",
        "max_length": 128,
        **changes,
    }
    config = data_config(**settings)
    found = ensure_prepared(
        config, tokenizer_folder=folder / "tokenizer", cache=folder / "cache", seed=0, say=lambda sentence: None
    )
    return PreparedRows.open(found.train, pad_to_multiple_of=config.pad_to_multiple_of)


def test_a_padded_batch_is_its_documents(folder: Path) -> None:
    rows = prepared(folder, "sft", pad_to_multiple_of=8)
    batch = rows.batch([3, 0, -1, 7])
    lengths = [int(rows.lengths[i]) for i in (3, 0)]
    assert batch.input_ids_BT.shape == (4, -(-max(int(rows.lengths[i]) for i in (3, 0, 7)) // 8) * 8)
    for b, (index, length) in enumerate(zip((3, 0), lengths, strict=True)):
        document = int(rows.segment_documents[index])
        assert batch.input_ids_BT[b, :length].tolist() == rows.document_ids(document).tolist()
        assert batch.attention_mask_BT is not None and batch.attention_mask_BT[b].tolist() == [1] * length + [0] * (
            batch.input_ids_BT.shape[1] - length
        )
        labels = batch.labels_BT[b]
        assert (labels[length:] == IGNORED).all() and labels[0] == IGNORED
        learnt = labels != IGNORED
        assert learnt.sum() == rows.trained_tokens[index] > 0
        assert (labels[learnt] == batch.input_ids_BT[b][learnt]).all()
    assert (batch.labels_BT[2] == IGNORED).all() and batch.row_ids == ((3,), (0,), (), (7,))
    assert batch.num_tokens == int(rows.lengths[[3, 0, 7]].sum())
    assert batch.num_trained_tokens == int(rows.trained_tokens[[3, 0, 7]].sum())
    assert set(batch.model_inputs()) == {"input_ids", "use_cache"}


def test_a_batch_of_fillers_alone_has_no_target(folder: Path) -> None:
    for packing in ("none", "best_fit"):
        batch = prepared(folder, "sft", packing=packing).batch([-1, -1])
        assert batch.num_tokens == batch.num_trained_tokens == 0 and batch.input_ids_BT.shape == (2, 1)


@pytest.mark.parametrize("packing", ["none", "best_fit", "split"])
def test_trained_tokens_add_up(folder: Path, packing: str) -> None:
    rows = prepared(folder, "sft", packing=packing, max_length=96)
    alone = [rows.batch([i]) for i in range(rows.rows)]
    assert [batch.num_trained_tokens for batch in alone] == rows.trained_tokens.tolist()
    assert [batch.num_tokens for batch in alone] == rows.lengths.tolist()
    assert rows.meta.statistics.trained_tokens == sum(rows.trained_tokens.tolist())
    assert sorted({row for batch in alone for ids in batch.row_ids for row in ids}) == list(range(40))
    assert max(rows.lengths) <= 96


def test_packed_rows_restart_and_their_first_tokens_are_no_targets(folder: Path) -> None:
    rows = prepared(folder, "sft", packing="best_fit")
    batch = rows.batch([0, rows.rows - 1])
    assert batch.position_ids_BT is not None and batch.attention_mask_BT is None
    edges = batch.boundaries.tolist()
    width = batch.input_ids_BT.shape[1]
    for span in batch.documents:
        assert batch.position_ids_BT[span.sequence, span.start : span.stop].tolist() == list(
            range(span.stop - span.start)
        )
        assert batch.labels_BT[span.sequence, span.start] == IGNORED
        assert span.sequence * width + span.start in edges and span.sequence * width + span.stop in edges
    assert edges[0] == 0 and edges[-1] == 2 * width and batch.longest == int(np.diff(edges).max())
    assert attention.boundaries_of(batch.position_ids_BT, 2, width).tolist() == edges


def test_a_pair_is_two_sequences_or_two_documents_of_one_row(folder: Path) -> None:
    loose, packed = prepared(folder, "pairs"), prepared(folder, "pairs", packing="best_fit")
    batch = loose.batch([0, 5, -1])
    assert batch.input_ids_BT.shape[0] == 6 and len(batch.documents) == 4 and batch.row_ids == ((0,), (5,), ())
    assert batch.values_D.tolist() == [0.0, 0.0, 5 / 8, 5 / 8]
    whole = packed.batch(range(packed.rows))
    assert len(whole.documents) == 48 and whole.input_ids_BT.shape[0] == packed.rows < 12
    assert all(
        a.sequence == b.sequence and a.stop == b.start
        for a, b in zip(whole.documents[::2], whole.documents[1::2], strict=True)
    )
    assert sorted(row for ids in whole.row_ids for row in ids) == list(range(24))
    assert packed.lengths.max() <= 256


def test_prompts_and_classes(folder: Path) -> None:
    write_jsonl(
        folder / "prompts.jsonl",
        [{"prompt": [{"role": "user", "content": f"{i}+1?"}], "answer": i + 1} for i in range(5)],
    )
    rows = prepared(folder, "prompts")
    prompt = rows.prompt(3)
    assert prompt.extra == {"answer": 4} and prompt.row == 3 and rows.meta.kind == "prompt"
    assert len(prompt.ids) == rows.lengths[3] and rows.trained_tokens.sum() == 0
    write_jsonl(
        folder / "classes.jsonl", [{"text": f"t{i}", "label": ["good", "bad", "ugly"][i % 3]} for i in range(6)]
    )
    classes = prepared(folder, "classes")
    assert classes.meta.classes == ("bad", "good", "ugly")
    names = Classes(problem="single_label", names=classes.meta.classes)
    assert targets_of(classes, names).of_D.tolist() == [1, 0, 2, 1, 0, 2]
    write_jsonl(
        folder / "feedback.jsonl", [{"prompt": "p", "completion": f" c{i}", "label": i % 2 == 0} for i in range(4)]
    )
    assert prepared(folder, "feedback").batch([0, 1]).values_D.tolist() == [1.0, 0.0]


# --- packed against unpacked -------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "vocab_size": 700,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def model_of(name: str, implementation: str) -> PreTrainedModel:
    attention.register()
    torch.manual_seed(0)
    match name:
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**SIZES))
        case "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16))
        case _:
            model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=24))
    model.set_attn_implementation(implementation)
    return model


def document_logits(model: PreTrainedModel, batch: Batch) -> list[torch.Tensor]:
    """Logits of every document of a batch, [T, V] each."""
    logits = model(**batch.model_inputs()).logits
    return [logits[span.sequence, span.start : span.stop] for span in batch.documents]


def alone_logits(model: PreTrainedModel, batch: Batch) -> list[torch.Tensor]:
    """The same documents, one forward pass each."""
    spans = batch.documents
    return [
        model(input_ids=batch.input_ids_BT[span.sequence : span.sequence + 1, span.start : span.stop]).logits[0]
        for span in spans
    ]


PATHS = [(name, path) for name in ("llama", "qwen3", "mistral") for path in ("eager", "sdpa", "documents")]


@pytest.mark.parametrize(("name", "path"), PATHS)
@pytest.mark.parametrize("set_name", ["sft", "pairs"])
def test_packed_logits_losses_and_gradients_are_the_unpacked_ones(
    folder: Path, name: str, path: str, set_name: str
) -> None:
    rows = prepared(folder, set_name, packing="best_fit")
    batch = rows.batch([0, rows.rows - 1])
    reference, model = model_of(name, "eager"), model_of(name, path)
    model.load_state_dict(reference.state_dict())
    expected, found = alone_logits(reference, batch), document_logits(model, batch)
    assert max(float((a - b).abs().max().detach()) for a, b in zip(expected, found, strict=True)) < 1e-4
    losses = []
    for run in (expected, found):
        parts = [batch.labels_BT[span.sequence, span.start : span.stop] for span in batch.documents]
        losses.append(sum(cross_entropy(x[:-1], y[1:], reduction="sum") for x, y in zip(run, parts, strict=True)))
    assert float((losses[0] - losses[1]).detach()) == pytest.approx(0, abs=1e-3) and float(losses[0].detach()) > 100
    shifted = model(**batch.model_inputs()).logits[:, :-1].flatten(0, 1)
    whole = cross_entropy(shifted, batch.labels_BT[:, 1:].flatten(), reduction="sum")
    assert float((whole - losses[0]).detach()) == pytest.approx(0, abs=1e-3)
    for loss in losses:
        loss.backward()
    for (parameter, one), two in zip(reference.named_parameters(), model.parameters(), strict=True):
        scale = float(one.grad.abs().max())
        assert float((one.grad - two.grad).abs().max()) <= 1e-4 * max(scale, 1e-3), parameter


def test_packed_pairs_have_the_log_probabilities_of_loose_ones(folder: Path) -> None:
    """What DPO and its family need: the sum over each answer, packed or not."""
    loose, packed = prepared(folder, "pairs"), prepared(folder, "pairs", packing="best_fit")
    model = model_of("llama", "documents")
    sums: list[dict[tuple[int, int], float]] = []
    for rows in (loose, packed):
        found: dict[tuple[int, int], float] = {}
        batch = rows.batch(range(rows.rows))
        with torch.no_grad():
            logits = model(**batch.model_inputs()).logits
        sources = [row for ids in batch.row_ids for row in ids]
        for d, span in enumerate(batch.documents):
            labels = batch.labels_BT[span.sequence, span.start + 1 : span.stop]
            scores = log_softmax(logits[span.sequence, span.start : span.stop - 1], dim=-1)
            picked = scores.gather(1, labels.clamp(min=0)[:, None])[:, 0]
            found[sources[d // 2], d % 2] = float(picked[labels != IGNORED].sum())
        sums.append(found)
    assert sums[0].keys() == sums[1].keys() and len(sums[0]) == 48
    assert max(abs(sums[0][key] - sums[1][key]) for key in sums[0]) < 1e-3


def test_an_all_ones_mask_or_a_cache_lets_documents_see_each_other(folder: Path) -> None:
    """The traps: this is why `model_inputs` gives packed rows no mask and no cache."""
    batch = prepared(folder, "sft", packing="best_fit").batch([0])
    model, inputs = model_of("llama", "sdpa"), batch.model_inputs()
    with torch.no_grad():
        right = model(**batch.model_inputs()).logits
        leaking = model(**inputs, attention_mask=torch.ones_like(batch.input_ids_BT)).logits
        cached = model(**{**inputs, "use_cache": True}).logits
    first = batch.documents[0].stop
    for wrong in (leaking, cached):
        assert (right[0, :first] - wrong[0, :first]).abs().max() < 1e-5
        assert (right[0, first:] - wrong[0, first:]).abs().max() > 1e-3


def test_boundaries_are_found_from_positions_where_a_caller_gives_none(folder: Path) -> None:
    batch = prepared(folder, "sft", packing="best_fit").batch([0, 1])
    model = model_of("llama", "documents")
    with torch.no_grad():
        given = model(**batch.model_inputs()).logits
        derived = model(input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False).logits
    assert torch.equal(given, derived)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sixteen_bits_in_blocks(folder: Path, checkpointing: bool) -> None:
    """bf16 by blocks is as near to fp32 as torch's own bf16 attention is, in the logits and the gradients."""
    batch = prepared(folder, "sft", packing="best_fit").batch([0, 1, 2])
    exact = model_of("llama", "eager")
    errors: dict[str, tuple[float, float]] = {}
    for path in ("eager", "documents"):
        model = model_of("llama", path)
        model.load_state_dict(exact.state_dict())
        model.to(torch.bfloat16)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        reference = model_of("llama", "eager")
        reference.load_state_dict(exact.state_dict())
        for one in (model, reference):
            logits = one(**batch.model_inputs()).logits[:, :-1].flatten(0, 1).float()
            cross_entropy(logits, batch.labels_BT[:, 1:].flatten()).backward()
        with torch.no_grad():
            real = torch.cat(
                [x - y for x, y in zip(document_logits(model, batch), document_logits(reference, batch), strict=True)]
            )
        grads = [
            (p.grad.float() - q.grad).norm() / q.grad.norm()
            for p, q in zip(model.parameters(), reference.parameters(), strict=True)
        ]
        errors[path] = (float(real.float().norm()), float(max(grads)))
    assert errors["documents"][0] <= 1.5 * errors["eager"][0]
    assert errors["documents"][1] <= 1.5 * errors["eager"][1]


def test_blocks_by_finite_differences() -> None:
    """The backward pass of the blocks against numbers: groups with and without filling, kept and computed again."""
    generator = torch.Generator().manual_seed(0)
    edges = (0, 5, 9, 10, 13)
    saved = attention_blocks.KEPT_TOKENS
    try:
        for kept in (0, 256):
            attention_blocks.KEPT_TOKENS = kept
            q, k, v = (
                torch.randn(heads, 13, 3, generator=generator, dtype=torch.float64, requires_grad=True)
                for heads in (4, 2, 2)
            )
            plan = attention_blocks.plan_groups(edges)
            assert plan is not None and any(group.real is not None for group in plan)
            assert torch.autograd.gradcheck(
                lambda q, k, v, plan=plan: attention_blocks.Blocks.apply(q, k, v, plan, 0.5), (q, k, v)
            )
    finally:
        attention_blocks.KEPT_TOKENS = saved


def test_what_an_architecture_asks_for_beyond_it_is_refused(folder: Path) -> None:
    """A soft cap that is left out in silence would be another model."""
    query = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ConfigError, match=r"does not compute softcap.*set model\.attention=eager"):
        attention.documents_attention(torch.nn.Identity(), query, query, query, None, softcap=30.0)
    with pytest.raises(ConfigError, match="both directions over packed rows"):
        attention.documents_attention(
            torch.nn.Identity(), query, query, query, None, is_causal=False, cu_seq_lens_q=torch.tensor([0, 4])
        )


def test_generation_is_that_of_sdpa(folder: Path) -> None:
    """The same implementation serves padded prompts, caches and single tokens."""
    ids = torch.randint(3, 700, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    answers = [
        model_of("llama", path).generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        for path in ("sdpa", "documents")
    ]
    assert torch.equal(answers[0], answers[1])


def test_documents_too_long_for_blocks_go_one_by_one() -> None:
    assert attention_blocks.plan_groups((0, attention_blocks.BLOCK_TOKENS + 1)) is None
    plan = attention_blocks.plan_groups((0, 100, 190, 200, 210, 215))
    assert plan is not None and [(group.num, group.length) for group in plan] == [(2, 100), (2, 10), (1, 5)]
    assert sorted(place for group in plan for place in group.real_positions.tolist()) == list(range(215))


def test_json_extras_survive(folder: Path) -> None:
    write_jsonl(folder / "odd.jsonl", [{"prompt": "p", "answer": "zwei\n東", "n": None}])
    assert prepared(folder, "odd").prompt(0).extra == {"answer": "zwei\n東", "n": None}
