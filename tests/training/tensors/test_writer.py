"""Files that are written tensor by tensor are those of the library, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from orchestrator.errors import RunFolderError
from orchestrator.files.manifest import file_digest
from orchestrator.tensors.writer import INDEX, Entry, TensorFile, in_file_order, split_into_shards, write_index

TENSORS = {
    "b": torch.arange(15.0).reshape(3, 5),
    "a": torch.arange(7).to(torch.bfloat16),
    "layers.10": torch.zeros(0, 3),
    "layers.2": torch.ones(2, 2, 2).transpose(0, 1),
    "steps": torch.arange(5),
    "codes": torch.ones(3, dtype=torch.uint8),
    "scalar": torch.tensor(2.0, dtype=torch.float16),
}
ENTRIES = [Entry.of(name, tensor) for name, tensor in TENSORS.items()]


@pytest.mark.parametrize("metadata", [{"format": "pt"}, None])
def test_a_file_is_that_of_the_library(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "whole", metadata=metadata)
    file = TensorFile(tmp_path / "streamed", ENTRIES, metadata)
    for entry in in_file_order(ENTRIES):
        file.append(entry.name, TENSORS[entry.name])
    written = file.close()
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert (written.bytes, written.sha256) == ((tmp_path / "whole").stat().st_size, file_digest(tmp_path / "whole"))


def test_shards_stay_within_the_limit_and_the_index_names_their_owners(tmp_path: Path) -> None:
    entries = [Entry(name=f"w{n}", shape=(10,), dtype=torch.float32) for n in range(5)]
    big = Entry(name="big", shape=(1000,), dtype=torch.float32)
    shards = split_into_shards([*entries, big], limit=100)
    assert [[entry.name for entry in shard] for shard in shards.values()] == [
        ["w0", "w1"],
        ["w2", "w3"],
        ["w4"],
        ["big"],
    ]
    write_index(tmp_path, shards, parameters=1050)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["weight_map"]["w3"] == "model-00002-of-00004.safetensors"
    assert index["metadata"] == {"total_parameters": 1050, "total_size": 4200}
    assert list(split_into_shards(entries, limit=1000)) == ["model.safetensors"]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="/dev/full: the disk is full"):
        file = TensorFile(Path("/dev/full"), ENTRIES, None)
        for entry in in_file_order(ENTRIES):
            file.append(entry.name, TENSORS[entry.name])
        file.close()


def test_a_tensor_out_of_order_is_a_defect(tmp_path: Path) -> None:
    file = TensorFile(tmp_path / "file", ENTRIES, None)
    with pytest.raises(AssertionError, match="is next"):
        file.append("a", TENSORS["a"])
    file.abandon()
