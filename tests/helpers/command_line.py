"""Runs the command line in this process; builds the smallest folders that the login side accepts. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.cli.main import main
from orchestrator.metrics.screen import MARK

SLURM_SIZE = ("cluster.cpus_per_task=8", "cluster.memory=32G", "cluster.time_limit='1:00:00'")
ROW = {"instruction": "Say red", "input": "", "output": "red"}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@dataclass(frozen=True)
class Answer:
    """Output and exit code of a command."""

    code: int
    out: str
    errors: tuple[str, ...]
    """Lines of stderr, without `error: `."""


class Asker:
    """Runs commands in this process, from a separate folder."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capture = capture

    def __call__(self, *words: str) -> Answer:
        self._capture.readouterr()
        code = main(words)
        told = self._capture.readouterr()
        lines = [
            line for line in told.err.splitlines() if not line.startswith(MARK)
        ]  # a loaded machine is slow, not wrong
        return Answer(code, told.out, tuple(line.removeprefix("error: ") for line in lines))

    def refused(self, *words: str, code: int = 2) -> tuple[str, ...]:
        """The sentences of a refusal: one line each, no traceback, and no new file."""
        before = files_of(self.folder)
        answer = self(*words)
        assert answer.code == code, (words, answer)
        assert answer.errors, words
        assert not any("Traceback" in line or line.startswith("  ") for line in answer.errors), answer.errors
        assert files_of(self.folder) == before, words
        return answer.errors


def latest(overrides: Sequence[str]) -> list[str]:
    """The overrides with only the last value of each key, since the command line rejects duplicate keys."""
    keys = [text.lstrip("+").partition("=")[0] if "=" in text and text[0] not in "~-" else "" for text in overrides]
    return [text for place, text in enumerate(overrides) if not keys[place] or keys[place] not in keys[place + 1 :]]


def files_of(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its content (None for folders and other non-files)."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def write_rows(path: Path, rows: Iterable[Mapping[str, object] | str]) -> Path:
    """Write a JSONL file; a row given as text is written verbatim."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_model(folder: Path) -> Path:
    """A model folder that has all files, with a single tensor of zeros."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    write_tensors(folder / "model.safetensors")
    return folder


def write_tensors(path: Path, *, count: int = 4) -> Path:
    """A safetensors file with one fp32 vector of zeros."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4 * count))
    return path
