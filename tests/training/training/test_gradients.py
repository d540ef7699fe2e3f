"""The gradient of a global batch does not depend on how it is split, and it is the one that TRL computes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import forking
import pytest
import tiny_model
import torch
from datasets import Dataset
from safetensors.torch import load_file

from orchestrator.data.order import BatchOrder
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.losses.token_cross_entropy import token_cross_entropy_sum

RANK = Path(__file__).with_name("rank_gradient.py")
GLOBAL_SIZE = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gradients")
    tiny_model.write_llama(folder / "model")
    tiny_model.write_rows(folder / "rows.jsonl", 24)
    return folder


def _gradient(place: Path, *, micro_size: int, ranks: int) -> dict[str, torch.Tensor]:
    out = place / f"{micro_size}x{ranks}.safetensors"
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    argv = [
        sys.executable,
        *launcher,
        str(RANK),
        str(place / "model"),
        str(place / "rows.jsonl"),
        str(micro_size),
        str(out),
    ]
    subprocess.run(argv, check=True, timeout=240, env=forking.environment())
    return load_file(out)


@pytest.fixture(scope="module")
def whole(place: Path) -> dict[str, torch.Tensor]:
    """The gradient of all eight rows in one forward pass of one process."""
    return _gradient(place, micro_size=GLOBAL_SIZE, ranks=1)


def _relative_distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys() and len(one) > 10
    distance = sum(float((one[name] - other[name]).double().square().sum()) for name in one)
    return (distance / sum(float(tensor.double().square().sum()) for tensor in one.values())) ** 0.5


@pytest.mark.parametrize(("micro_size", "ranks"), [(1, 1), (2, 2)])
def test_a_split_batch_has_the_same_gradient(
    place: Path, whole: dict[str, torch.Tensor], micro_size: int, ranks: int
) -> None:
    assert _relative_distance(whole, _gradient(place, micro_size=micro_size, ranks=ranks)) < 1e-5


def test_trl_computes_the_same_loss_and_gradient(place: Path, whole: dict[str, torch.Tensor]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    (prepared,) = {path.parent for path in (place / "cache").rglob("meta.json")}
    rows = PreparedRows.open(prepared)
    batch = rows.batch(BatchOrder(rows.rows, GLOBAL_SIZE, 0).global_batch(0))
    lengths = {int(length) for length in (batch.labels_BT != -100).sum(1)}
    assert len(lengths) > 2, "the rows must have unequal numbers of trained tokens"
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    arguments = SFTConfig(
        output_dir=str(place / "trl"), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "a", "completion": "b"}]),
        processing_class=AutoTokenizer.from_pretrained(place / "model"),
    )
    inputs = {**batch.model_inputs(), "labels": batch.labels_BT}
    loss = trainer.compute_loss(model, inputs, num_items_in_batch=batch.num_trained_tokens)
    loss.backward()
    ours = token_cross_entropy_sum(model(**batch.model_inputs()).logits, batch.labels_BT) / batch.num_trained_tokens
    assert float(loss) == pytest.approx(float(ours), rel=1e-5)
    assert _relative_distance(whole, {name: parameter.grad for name, parameter in model.named_parameters()}) < 1e-5


def test_untrained_positions_have_no_part_in_the_loss() -> None:
    logits_BTV = torch.zeros(1, 3, 4)
    logits_BTV[0, 1] = torch.tensor([0.0, 0.0, 100.0, 0.0])
    labels_BT = torch.tensor([[-100, -100, 2]])
    assert float(token_cross_entropy_sum(logits_BTV, labels_BT)) == pytest.approx(0.0, abs=1e-6)
    assert float(token_cross_entropy_sum(logits_BTV, torch.tensor([[0, 1, -100]]))) == pytest.approx(
        torch.log(torch.tensor(4.0)).item(), abs=1e-6
    )
