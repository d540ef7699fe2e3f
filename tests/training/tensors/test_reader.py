"""The reader of safetensors: the library's values, only the bytes asked for, and faults by file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from orchestrator.errors import CheckpointError, ModelError
from orchestrator.tensors.reader import TensorFolder
from orchestrator.tensors.writer import INDEX

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.randn(4, 5, dtype=torch.bfloat16),
    "c": torch.tensor(7),
    "d": torch.tensor([True, False, True]),
    "e": torch.empty(0, 3),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def test_tensors_are_those_of_the_library(folder: Path) -> None:
    tensors = TensorFolder.open(folder)
    assert set(tensors.names) == set(TENSORS)
    for name, value in TENSORS.items():
        assert tensors.shape(name) == tuple(value.shape) and tensors.dtype(name) == value.dtype
        assert torch.equal(tensors.read(name), value)


def test_a_range_reads_its_own_bytes_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    preadv = os.preadv

    def counting(file: int, buffers: list[memoryview], offset: int) -> int:
        sizes.append(sum(len(buffer) for buffer in buffers))
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", counting)
    values = TensorFolder.open(folder).read_flat("b", 3, 9)
    assert torch.equal(values, TENSORS["b"].reshape(-1)[3:9]) and sizes == [12]


def test_shards_are_found_by_their_index(tmp_path: Path) -> None:
    save_file({"a": TENSORS["a"]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": TENSORS["b"]}, tmp_path / "model-00002-of-00002.safetensors")
    owners = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": owners}))
    tensors = TensorFolder.open(tmp_path)
    assert tensors.names == ["a", "b"] and torch.equal(tensors.read("b"), TENSORS["b"])
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"missing.*model-00002-of-00002"):
        TensorFolder.open(tmp_path)


@pytest.mark.parametrize("spoil", ["truncated", "header", "empty", "index", "none"])
def test_a_bad_folder_is_named(folder: Path, spoil: str) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    match spoil:
        case "truncated":
            file.write_bytes(content[:-1])
        case "header":
            file.write_bytes(content[:8] + b"x" + content[9:])
        case "empty":
            file.write_bytes(b"")
        case "index":
            file.rename(folder / INDEX)
        case _:
            file.unlink()
    with pytest.raises(ModelError, match=str(folder)):
        TensorFolder.open(folder, fault=ModelError)


def test_a_file_that_shrinks_after_its_header_was_read_is_named(folder: Path) -> None:
    tensors = TensorFolder.open(folder)
    os.truncate(folder / "model.safetensors", 40)
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated"):
        tensors.read("a")
