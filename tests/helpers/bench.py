"""Runs the real command line on a tiny model, as a user would, and reads the output and files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forking
import tiny_model
from command_line import latest

from orchestrator.files.atomic import read_json
from orchestrator.metrics.jsonl import last_attempt_rows, read_rows
from orchestrator.run_folder.folder import RunFolder, StageFolder

MINUTES = 60


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A folder with a tiny model, rows, and its own cache."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        cache = {"ORCHESTRATOR_CACHE": str(self.root / "cache"), "HF_HUB_OFFLINE": "1"}
        return forking.environment({**os.environ, **cache}) | (extra or {})

    def words(self, name: str, *more: str) -> list[str]:
        """The overrides of a six-step fp32 run on the tiny model."""
        defaults = [
            "+experiment=llama_lora",
            f"name={name}",
            f"output_dir={self.runs}",
            f"model.base={self.model}",
            "model.dtype=float32",
            f"stages.sft.data.train.path={self.root / 'rows.jsonl'}",
            f"stages.sft.data.eval.path={self.root / 'held_out.jsonl'}",
            "stages.sft.max_steps=6",
            "stages.sft.batch.global_size=8",
            "stages.sft.batch.micro_size=2",
            "tracking=none",
        ]
        return latest([*defaults, *more])

    def run(
        self,
        name: str,
        *more: str,
        verb: str = "run",
        words: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Done:
        """Run a command; `words` replace all overrides."""
        argv = [
            sys.executable,
            "-m",
            "orchestrator",
            verb,
            *(self.words(name, *more) if words is None else latest(words)),
        ]
        ended = subprocess.run(
            argv, cwd=self.root, env=self.environment(environment), capture_output=True, text=True, timeout=8 * MINUTES
        )
        return Done(code=ended.returncode, out=ended.stdout, error=ended.stderr, folder=RunFolder(self.runs / name))


@dataclass(frozen=True, kw_only=True)
class Done:
    """Outcome of a command."""

    code: int
    out: str
    error: str
    folder: RunFolder

    @property
    def sft(self) -> StageFolder:
        return self.folder.stage("sft")

    @property
    def told(self) -> str:
        return self.out + self.error

    def result(self) -> dict[str, Any]:
        assert self.code == 0, self.told
        return read_json(self.sft.result)

    def losses(self) -> list[float]:
        """The training loss of every step, in order."""
        rows = [row for row in last_attempt_rows(read_rows(self.sft.metrics)) if "loss" in row]
        return [float(str(row["loss"])) for row in rows]


def make_bench(root: Path, *, hidden: int = 32, rows: int = 40) -> Bench:
    root.mkdir(parents=True, exist_ok=True)
    tiny_model.write_llama(root / "model", hidden=hidden)
    tiny_model.write_rows(root / "rows.jsonl", rows)
    tiny_model.write_rows(root / "held_out.jsonl", 9, start=1000)
    return Bench(root=root)
