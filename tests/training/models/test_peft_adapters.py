"""PEFT's family of adapters in one process: the base at first, the parameters of the plan, merges, first values, allocation."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import tiny_model
import torch
from safetensors.torch import load_file

from orchestrator.architecture.adapter_parameters import count_adapter_parameters
from orchestrator.architecture.read import read_architecture
from orchestrator.composition.compose import compose
from orchestrator.config.run import RunConfig
from orchestrator.config.training import TrainingStage
from orchestrator.config.tuning import ADAPTER_TUNINGS, AdaloraTuning
from orchestrator.distributed.runtime import start_single_runtime
from orchestrator.losses.token_logprobs import labelled_positions
from orchestrator.models.artifact import ArtifactFacts, open_adapter, write_artifact
from orchestrator.models.artifact_stream import LiveParameters
from orchestrator.models.causal_lm import Query
from orchestrator.models.loading import load_model, silence_libraries
from orchestrator.models.peft_adapters import apply_loftq_init, dequantised
from orchestrator.models.tuning import apply_tuning, keep_input_types
from orchestrator.training.adalora_ranks import KEPT, RankAllocation
from orchestrator.training.optimizer import RATE, build_optimizer

MERGED = {
    "lora": ("tuning=lora",),
    "rslora": ("tuning=lora", "tuning.use_rslora=true"),
    "dora": ("tuning=lora", "tuning.use_dora=true"),
    "pissa": ("tuning=lora", "tuning.init=pissa"),
    "pissa with rslora": ("tuning=lora", "tuning.init=pissa", "tuning.use_rslora=true"),
    "pissa, randomised": ("tuning=lora", "tuning.init=pissa_niter_8"),
    "ia3": ("tuning=ia3",),
    "vera": ("tuning=vera", "tuning.rank=16"),
    "oft": ("tuning=oft", "tuning.block_size=8"),
    "oft, exact": ("tuning=oft", "tuning.block_size=8", "tuning.use_cayley_neumann=false"),
    "adalora": ("tuning=adalora",),
}
VIRTUAL = {"prompt": ("tuning=prompt",), "prefix": ("tuning=prefix",)}
REFT = {"loreft": ("tuning=loreft",), "direft": ("tuning=loreft", "tuning.variant=direft")}
IN_16_BITS = [
    (method, precision)
    for method in (*MERGED, *VIRTUAL, *REFT)
    for precision in ("autocast", "bfloat16")
    if (method, precision) != ("oft, exact", "bfloat16")  # refused by the rules
]
IDS_BT = torch.arange(3, 43).reshape(2, 20)
FACTS = {"kind": "sft", "stage": "sft", "format": "sft"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    silence_libraries()
    return tiny_model.write_llama(tmp_path_factory.mktemp("adapters") / "model", hidden=64)


def _config(folder: Path, *words: str) -> RunConfig:
    return compose(["+experiment=llama_lora", f"model.base={folder}", "model.dtype=float32", *words])


def _base(folder: Path, config: RunConfig) -> Any:
    return load_model(folder, config, weights_dtype=torch.float32).eval()


def _tuned(folder: Path, config: RunConfig, *, moved: bool) -> Any:
    torch.manual_seed(0)
    model: Any = apply_tuning(_base(folder, config), config).eval()
    if moved:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS_BT, use_cache=False).logits


@pytest.mark.parametrize("method", MERGED)
def test_before_the_first_step_the_model_is_the_base(folder: Path, method: str) -> None:
    config = _config(folder, *MERGED[method])
    base, model = _logits(_base(folder, config)), _tuned(folder, config, moved=False)
    if method.startswith("pissa"):  # the residual and the principal part, added again
        torch.testing.assert_close(_logits(model), base, rtol=0, atol=1e-5)
    else:
        assert torch.equal(_logits(model), base)


@pytest.mark.parametrize("method", MERGED)
def test_saved_opened_and_merged_it_is_the_trained_model(folder: Path, tmp_path: Path, method: str) -> None:
    config = _config(folder, *MERGED[method])
    model = _tuned(folder, config, moved=True)
    trained = _logits(model)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    runtime = start_single_runtime(config, autocast=False)
    write_artifact(
        runtime,
        LiveParameters(runtime=runtime, module=model, names=names),
        tmp_path / "artifact",
        ArtifactFacts(config=config, base_folder=folder, manifest=FACTS),
    )
    torch.manual_seed(99)
    opened: Any = open_adapter(_base(folder, config), tmp_path / "artifact").eval()
    torch.testing.assert_close(_logits(opened), trained, rtol=0, atol=1e-5)
    base = _logits(_base(folder, config))
    assert not torch.allclose(trained, base, atol=1e-3), "what was added is seen"
    with opened.disable_adapter():
        assert torch.equal(_logits(opened), base)
    merged = opened.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(_logits(merged), trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", VIRTUAL)
def test_virtual_tokens_open_again_and_are_scored_past(folder: Path, tmp_path: Path, method: str) -> None:
    config = _config(folder, *VIRTUAL[method])
    model = _tuned(folder, config, moved=True)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    runtime = start_single_runtime(config, autocast=False)
    write_artifact(
        runtime,
        LiveParameters(runtime=runtime, module=model, names=names),
        tmp_path / "artifact",
        ArtifactFacts(config=config, base_folder=folder, manifest=FACTS),
    )
    opened: Any = open_adapter(_base(folder, config), tmp_path / "artifact").eval()
    torch.testing.assert_close(_logits(opened), _logits(model), rtol=0, atol=1e-6)
    labels_BT = IDS_BT.masked_fill(torch.arange(20) < 8, -100)
    with torch.no_grad():
        told, _ = model(
            input_ids=IDS_BT,
            use_cache=False,
            query=Query(labels_BT=labels_BT, positions_K=labelled_positions(labels_BT)),
        )
    own = _logits(model)[:, -20:].log_softmax(-1)[:, :-1].gather(2, IDS_BT[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(told[:, 8:], own[:, 7:], rtol=0, atol=1e-5)
    assert not told[:, :8].any()
    answers = [
        one.generate(input_ids=IDS_BT[:1], max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        for one in (model, opened)
    ]
    assert torch.equal(*answers) and answers[0].shape == (1, 26)
    assert int(_logits(model)[0, -1].argmax()) == int(answers[0][0, 20])


@pytest.mark.parametrize("method", {**MERGED, **VIRTUAL})
def test_the_plan_counts_what_is_trained(folder: Path, method: str) -> None:
    config = _config(folder, *{**MERGED, **VIRTUAL}[method])
    architecture = read_architecture(folder)
    assert architecture is not None and isinstance(config.tuning, ADAPTER_TUNINGS)
    real = sum(p.numel() for p in _tuned(folder, config, moved=False).parameters() if p.requires_grad)
    assert real == count_adapter_parameters(architecture, config.tuning)


def test_loftq_brings_the_rounded_base_nearer_to_the_whole_one(folder: Path) -> None:
    config = _config(folder, "tuning=lora", "tuning.init=loftq", "quantization=nf4", "tuning.rank=8")
    whole = load_file(folder / "model.safetensors")
    model = _tuned(folder, config, moved=False)
    rounded = _logits(model)
    apply_loftq_init(model, folder)
    exact = _logits(_base(folder, _config(folder, "tuning=lora")))
    assert (_logits(model) - exact).norm() < 0.9 * (rounded - exact).norm()
    layer: Any = model.base_model.model.model.layers[0].mlp.up_proj
    residual = whole["model.layers.0.mlp.up_proj.weight"] - dequantised(layer.base_layer)
    left, values, right = torch.linalg.svd(residual)
    best = left[:, :8] * values[:8] @ right[:8]
    torch.testing.assert_close(layer.get_delta_weight("default"), best, rtol=0, atol=1e-5)


def test_lora_plus_gives_b_its_own_rate_and_no_group_is_empty(folder: Path) -> None:
    config = _config(folder, "tuning=lora", "tuning.lora_plus_ratio=16")
    stage = config.stages["sft"]
    assert isinstance(stage, TrainingStage)
    model = _tuned(folder, config, moved=False)
    optimizer = build_optimizer(model, stage.optimizer, lora_plus_ratio=16.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {group[RATE]: {names[id(p)].split(".")[-3] for p in group["params"]} for group in optimizer.param_groups}
    assert rates == {16.0: {"lora_B"}, 1.0: {"lora_A"}}


def test_ranks_fall_to_the_budget_and_stay(folder: Path) -> None:
    config = _config(
        folder, "tuning=adalora", "tuning.rank=2", "tuning.initial_rank=4", "tuning.allocate_every_steps=1"
    )
    tuning = config.tuning
    assert isinstance(tuning, AdaloraTuning)
    model = _tuned(folder, config, moved=False).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    allocation = RankAllocation(model, optimizer, tuning, steps=20)
    singular = [p for name, p in model.named_parameters() if ".lora_E." in name]
    alive: list[int] = []
    for step in range(1, 21):
        logits = model(input_ids=IDS_BT, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS_BT[:, 1:].flatten()).backward()
        allocation.add_penalty()
        optimizer.step()
        allocation.allocate(step)
        optimizer.zero_grad()
        alive.append(sum(int((p != 0).sum()) for p in singular))
    assert len(singular) == 14 and alive[0] == 56 and alive[13:] == [28] * 7
    assert all(later <= earlier for earlier, later in itertools.pairwise(alive))
    assert all(torch.equal(optimizer.state[p][KEPT] != 0, p != 0) for p in singular)
    assert len({int((p != 0).sum()) for p in singular}) > 1, "layers differ"


def test_the_penalty_is_that_of_peft(folder: Path) -> None:
    """PEFT adds it to the loss of a model that is given labels."""
    config = _config(folder, "tuning=adalora", "tuning.orthogonal_weight=0.5")
    assert isinstance(config.tuning, AdaloraTuning)
    found: list[dict[str, torch.Tensor]] = []
    for is_ours in (True, False):
        model = _tuned(folder, config, moved=True)
        model.peft_config["default"].orth_reg_weight = 0.0 if is_ours else 0.5
        allocation = RankAllocation(model, torch.optim.SGD(model.parameters(), lr=0.0), config.tuning, steps=10)
        model(input_ids=IDS_BT, labels=IDS_BT, use_cache=False).loss.backward()
        if is_ours:
            allocation.add_penalty()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("method", "precision"), IN_16_BITS)
def test_sixteen_bits_train_every_parameter(folder: Path, method: str, precision: str) -> None:
    """Autocast over fp32 adapters, as without DeepSpeed; and adapters of 16 bits, as ZeRO-1 and ZeRO-2 hold them."""
    config = _config(folder, *{**MERGED, **VIRTUAL, **REFT}[method], "model.dtype=bfloat16")
    model: Any = apply_tuning(load_model(folder, config, weights_dtype=torch.bfloat16), config).train()
    if precision == "bfloat16":
        model.to(torch.bfloat16)
    else:
        keep_input_types(model)
    labels_BT = IDS_BT.masked_fill(torch.arange(20) < 8, -100)
    query = Query(labels_BT=labels_BT, positions_K=labelled_positions(labels_BT))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
        scores_BT, _ = model(input_ids=IDS_BT, use_cache=False, query=query)
    scores_BT.sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained)
    assert any(bool(p.grad.any()) for p in trained if p.grad is not None)
