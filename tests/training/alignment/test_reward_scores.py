"""A reward model reads the score at the right token: alone as in any batch, whatever the padding id is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from orchestrator.composition.compose import compose
from orchestrator.dataloader.batch import batch_of
from orchestrator.distributed.runtime import Runtime, start_single_runtime
from orchestrator.models.loading import load_scorer
from orchestrator.training.objectives import document_scores

SIZE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}
END = 2


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return start_single_runtime(compose(["+experiment=llama_reward", "model.dtype=float32"]), autocast=False)


def scorer_of(family: str, folder: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    settings, model = FAMILIES[family]
    model(settings(**SIZE, eos_token_id=END, pad_token_id=None)).save_pretrained(folder)
    config = compose(["+experiment=llama_reward", f"model.base={folder}", "model.dtype=float32"])
    torch.manual_seed(1)
    return load_scorer(folder, config, weights_dtype=torch.float32, packed=False).eval()


def scores(runtime: Runtime, model: torch.nn.Module, texts: list[np.ndarray], *, pad_id: int) -> list[float]:
    nothing = [np.zeros(len(ids), dtype=np.bool_) for ids in texts]
    batch = batch_of(list(zip(texts, nothing, strict=True)), list(range(len(texts))), pad_id=pad_id)
    with torch.no_grad():
        return document_scores(runtime, model, batch).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_does_not_depend_on_the_batch_or_the_padding(runtime: Runtime, tmp_path: Path, family: str) -> None:
    model = scorer_of(family, tmp_path)
    random = np.random.default_rng(0)
    texts = [random.integers(3, 64, size=length) for length in (5, 17, 9, 30)]
    texts[1][3] = END  # an end within the prompt
    texts[2][-1] = END
    texts[3][:2] = END
    alone = [scores(runtime, model, [text], pad_id=0)[0] for text in texts]
    assert len({round(score, 4) for score in alone}) == 4
    for pad_id in (0, END, 63):
        assert scores(runtime, model, texts, pad_id=pad_id) == pytest.approx(alone, abs=1e-5)
        assert scores(runtime, model, texts[::-1], pad_id=pad_id) == pytest.approx(alone[::-1], abs=1e-5)


def test_transformers_reads_the_same_score_where_its_rule_holds(runtime: Runtime, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = scorer_of("llama", tmp_path / "base")
    model.save_pretrained(tmp_path / "scorer")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "scorer").eval()
    text = np.random.default_rng(1).integers(3, 64, size=11)
    with torch.no_grad():
        expected = theirs(input_ids=torch.from_numpy(text)[None]).logits.item()
    assert scores(runtime, model, [text], pad_id=0) == pytest.approx([expected], abs=1e-5)
