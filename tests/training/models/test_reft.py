"""LoReFT and DiReFT in one process: the formulas, the positions, packing, generation, checkpointing, and the folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_model
import torch

from orchestrator.architecture.adapter_parameters import count_adapter_parameters, count_sites
from orchestrator.architecture.read import read_architecture
from orchestrator.composition.compose import compose
from orchestrator.config.run import RunConfig
from orchestrator.config.tuning import LoreftTuning
from orchestrator.dataloader.batch import Batch, Span, batch_of
from orchestrator.distributed.runtime import start_single_runtime
from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.losses.token_logprobs import labelled_positions
from orchestrator.models.artifact import ArtifactFacts, open_artifact, write_artifact
from orchestrator.models.artifact_stream import LiveParameters
from orchestrator.models.loading import load_model
from orchestrator.models.reft import Intervention, orthonormal_RW, site_positions
from orchestrator.models.tuning import apply_tuning
from orchestrator.training.objectives import token_scores_BT

SITES = {"one site a layer": (), "two sites a layer": ("tuning.share_weights=false",)}
VARIANTS = ("loreft", "direft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write_llama(tmp_path_factory.mktemp("reft") / "model", layers=3)


def _config(folder: Path, *words: str) -> RunConfig:
    return compose(
        [
            "+experiment=llama_lora",
            "tuning=loreft",
            f"model.base={folder}",
            "model.dtype=float32",
            "tuning.rank=4",
            *words,
        ]
    )


def _model(folder: Path, config: RunConfig, *, moved: bool = True, packed: bool = False) -> Any:
    """With interventions that a training might have left."""
    torch.manual_seed(0)
    model: Any = apply_tuning(load_model(folder, config, weights_dtype=torch.float32, packed=packed), config)
    if moved:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def _documents() -> list[tuple[np.ndarray, np.ndarray]]:
    """Four of unequal lengths; the last prompts are shorter than both ends together."""
    draws = np.random.default_rng(0)
    lengths = [(30, 20), (25, 15), (12, 5), (9, 1)]
    return [(draws.integers(3, 259, size=all_of), np.arange(all_of) >= prompt) for all_of, prompt in lengths]


def _scores(model: Any, batch: Batch, config: RunConfig) -> torch.Tensor:
    return token_scores_BT(start_single_runtime(config, autocast=False), model, batch)[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_intervention_is_the_paper_s_formula(variant: Any) -> None:
    torch.manual_seed(1)
    ours = Intervention(16, 3, variant=variant, dropout=0.0)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    hidden_NW = torch.randn(5, 16)
    rotation_RW = ours.rotation
    if variant == "loreft":  # Gram-Schmidt is the QR decomposition whose triangle has a positive diagonal
        q, r = torch.linalg.qr(ours.rotation.T)
        rotation_RW = (q * r.diagonal().sign()).T
    inner_NR = hidden_NW @ ours.weight.T + ours.bias
    if variant == "loreft":
        inner_NR = inner_NR - hidden_NW @ rotation_RW.T
    torch.testing.assert_close(ours(hidden_NW), inner_NR @ rotation_RW, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_before_the_first_step_the_model_is_the_base(folder: Path, variant: str) -> None:
    config = _config(folder, f"tuning.variant={variant}")
    ids_BT = torch.arange(3, 43).reshape(2, 20)
    model, base = _model(folder, config, moved=False), load_model(folder, config, weights_dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(ids_BT).logits, base(ids_BT).logits)
        changed = _model(folder, config)
        assert not torch.allclose(changed(ids_BT).logits, base(ids_BT).logits, atol=1e-2)
        with changed.disable_adapter():
            assert torch.equal(changed(ids_BT).logits, base(ids_BT).logits)


def test_rows_stay_orthonormal_while_they_learn(folder: Path) -> None:
    config = _config(folder)
    model = _model(folder, config, moved=False).train()
    batch = batch_of(_documents(), range(4))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses: list[float] = []
    for _ in range(30):
        loss = -_scores(model, batch, config).sum() / batch.num_trained_tokens
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    for name, parameter in model.named_parameters():
        if name.endswith(".rotation"):
            rows_RW = orthonormal_RW(parameter.detach())
            torch.testing.assert_close(rows_RW @ rows_RW.T, torch.eye(4), rtol=0, atol=1e-5)
            assert not torch.allclose(parameter @ parameter.T, torch.eye(4), atol=1e-2), "the raw rows did move"


@pytest.mark.parametrize("sites", SITES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_plan_counts_what_is_trained(folder: Path, variant: str, sites: str) -> None:
    config = _config(folder, f"tuning.variant={variant}", "tuning.layers=[0,2]", *SITES[sites])
    architecture, tuning = read_architecture(folder), config.tuning
    assert architecture is not None and isinstance(tuning, LoreftTuning)
    counted = sum(p.numel() for p in _model(folder, config).parameters() if p.requires_grad)
    number = 2 if sites.startswith("one") else 4
    assert count_sites(architecture, tuning) == number
    assert counted == count_adapter_parameters(architecture, tuning) == number * (2 * 4 * 32 + 4)


@pytest.mark.parametrize(
    ("prompt", "first", "last", "wanted"),
    [
        ((0, 0, 20), 3, 2, ([0, 1, 2], [18, 19])),
        ((1, 5, 10), 3, 2, ([105, 106, 107], [108, 109])),
        ((0, 0, 4), 3, 3, ([0, 1], [2, 3])),
        ((0, 0, 3), 7, 7, ([0, 1], [2])),
        ((0, 0, 1), 2, 2, ([0], [])),
        ((0, 4, 4), 2, 2, ([], [])),
        ((0, 0, 4), 1, 7, ([0], [1, 2, 3])),
    ],
)
def test_no_position_is_changed_twice(
    folder: Path, prompt: tuple[int, int, int], first: int, last: int, wanted: tuple[list[int], list[int]]
) -> None:
    words = (f"tuning.first_positions={first}", f"tuning.last_positions={last}", "tuning.share_weights=false")
    tuning = _config(folder, *words).tuning
    assert isinstance(tuning, LoreftTuning)
    assert site_positions([prompt], tuning, width=100) == {"first": wanted[0], "last": wanted[1]}


@pytest.mark.parametrize("sites", SITES)
def test_packed_documents_score_as_they_do_alone(folder: Path, sites: str) -> None:
    config = _config(folder, *SITES[sites])
    model, packed_model = _model(folder, config), _model(folder, config, packed=True)
    documents = _documents()
    alone = [_scores(model, batch_of([one], [0]), config)[0] for one in documents]
    together = _scores(model, batch_of(documents, range(4)), config)
    packed = _scores(packed_model, _packed(documents), config)[0]
    for number, scores_T in enumerate(alone):
        torch.testing.assert_close(together[number, : len(scores_T)], scores_T, rtol=0, atol=1e-5)
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-5)
    assert not torch.allclose(_scores(model, replace(batch_of([documents[0]], [0]), prompts=()), config)[0], alone[0])


def _packed(documents: list[tuple[np.ndarray, np.ndarray]]) -> Batch:
    one = batch_of([(np.concatenate([ids for ids, _ in documents]), np.concatenate([t for _, t in documents]))], [0])
    edges = np.cumsum([0, *(len(ids) for ids, _ in documents)]).tolist()
    labels_BT = one.labels_BT.clone()
    labels_BT[0, edges[:-1]] = -100
    positions = torch.cat([torch.arange(len(ids)) for ids, _ in documents])[None]
    prompts = tuple(
        Span(0, start, start + int(trained.argmax())) for start, (_, trained) in zip(edges, documents, strict=False)
    )
    return replace(
        one,
        labels_BT=labels_BT,
        positions_K=labelled_positions(labels_BT),
        position_ids_BT=positions,
        boundaries=torch.tensor(edges, dtype=torch.int32),
        longest=max(len(ids) for ids, _ in documents),
        prompts=prompts,
    )


def test_generation_changes_the_prompt_alone_and_padding_does_not_matter(folder: Path) -> None:
    config = _config(folder)
    model = _model(folder, config)
    prompts = [torch.arange(5, 26), torch.arange(40, 49)]
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = [model.generate(input_ids=ids[None], **settings)[0, len(ids) :] for ids in prompts]
    padded_BT = torch.zeros(2, 21, dtype=torch.int64)
    for row, ids in enumerate(prompts):
        padded_BT[row, 21 - len(ids) :] = ids
    both = model.generate(input_ids=padded_BT, attention_mask=(padded_BT != 0).long(), **settings)[:, 21:]
    for ids, answer, other in zip(prompts, alone, both, strict=True):
        assert torch.equal(answer, other)
        whole = torch.cat([ids, answer]).numpy()
        batch = batch_of([(whole, np.arange(len(whole)) >= len(ids))], [0])
        logits = model(**batch.model_inputs()).logits  # all of it as a prompt: another model
        assert not torch.equal(logits[0, len(ids) - 1 : -1].argmax(-1), answer)
        assert _likeliest(model, ids, answer[:5], config) == int(answer[5])


def _likeliest(model: Any, prompt: torch.Tensor, answer: torch.Tensor, config: RunConfig) -> int:
    """Of all next tokens the one that scores highest as a trained token behind prompt and answer."""
    texts = [torch.cat([prompt, answer, torch.tensor([token])]).numpy() for token in range(260)]
    batch = batch_of([(text, np.arange(len(text)) >= len(prompt)) for text in texts], range(260))
    return int(_scores(model, batch, config)[:, -1].argmax())


def test_a_step_with_the_cache_is_the_same_as_without(folder: Path) -> None:
    model = _model(folder, _config(folder))
    ids_BT = torch.arange(5, 35)[None]
    with torch.no_grad():
        cache = model(input_ids=ids_BT[:, :20], use_cache=True).past_key_values
        steps = model(input_ids=ids_BT[:, 20:], past_key_values=cache, use_cache=True).logits.log_softmax(-1)
    batch = batch_of([(ids_BT[0].numpy(), np.arange(30) >= 20)], [0])
    scores_T = _scores(model, batch, _config(folder))[0]
    told = steps[0, :-1].gather(1, ids_BT[0, 21:, None]).squeeze(1)
    torch.testing.assert_close(scores_T[21:], told, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_gradient_checkpointing_changes_no_gradient(folder: Path) -> None:
    batch = batch_of(_documents(), range(4))
    found: list[dict[str, torch.Tensor]] = []
    for switch in ("false", "true"):
        config = _config(folder, f"model.gradient_checkpointing={switch}")
        model = _model(folder, config).train()
        _scores(model, batch, config).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert found[0] and all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_folder_opens_again_and_a_wrong_one_is_refused(folder: Path, tmp_path: Path) -> None:
    config = _config(folder, "tuning.share_weights=false")
    model = _model(folder, config)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    facts = {"kind": "sft", "stage": "sft", "format": "sft"}
    about = ArtifactFacts(config=config, base_folder=folder, manifest=facts)
    runtime = start_single_runtime(config, autocast=False)
    parameters = LiveParameters(runtime=runtime, module=model, names=names)
    write_artifact(runtime, parameters, tmp_path / "artifact", about)
    again: Any = open_artifact(
        tmp_path / "artifact", base_folder=folder, config=config, weights_dtype=torch.float32
    ).eval()
    ids_BT = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(model(ids_BT).logits, again(ids_BT).logits)
    settings = tmp_path / "artifact" / "reft_config.json"
    settings.write_text(settings.read_text().replace('"rank": 4', '"rank": 5'))
    with pytest.raises(CheckpointError, match="its interventions are not those"):
        open_artifact(tmp_path / "artifact", base_folder=folder, config=config, weights_dtype=torch.float32)


def test_a_layer_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"tuning.layers: \[3\], but the 3 layers are numbered 0 to 2"):
        _model(folder, _config(folder, "tuning.layers=[0,3]"))
