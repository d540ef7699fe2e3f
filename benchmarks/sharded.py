"""Resident memory of every process in every phase of a run on four gloo ranks under ZeRO-3, with the plan's figures.

    python benchmarks/sharded.py measure FOLDER [--size large|tiny] [--cells full,lora,qlora] [--steps train,resume,...]
    python benchmarks/sharded.py table FOLDER

A random Llama (full: 350 M parameters, lora and qlora: 1 B; float32) is trained for three steps and killed after its second checkpoint,
resumed, written, proven, evaluated, merged, exported and trained by GRPO: each a command of its own, whose result is added to
FOLDER/sharded.json. What is there is not measured again, so a measurement that was cut off goes on. `table` subtracts a bare worker with
its imports and compares with the rank's share of the states, two of the largest layers and 10 %; at size tiny the fixed 50 MB of
communication and threads exceed that. With the interpreter of another checkout's environment it measures that checkout.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import sharded_table
from resident import planned_bytes, watch
from wide_llama import Shape, write_base

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
import tiny_model

from orchestrator.files.atomic import write_json
from orchestrator.run_folder.checkpoints import saved_steps
from orchestrator.run_folder.folder import RunFolder, StageFolder

ROOT = Path(__file__).resolve().parents[1]
RANKS = 4
STEPS = ("train", "resume", "evaluate", "merge", "export", "grpo")
SIZES = {
    "large": {
        "full": Shape(hidden=1024, intermediate=4096, layers=23),
        "lora": Shape(hidden=2048, intermediate=8192, layers=16),
        "qlora": Shape(hidden=2048, intermediate=8192, layers=16),
    },
    "tiny": dict.fromkeys(("full", "lora", "qlora"), Shape(hidden=64, intermediate=128, layers=2)),
}
METHODS = {
    "full": ["tuning=full"],
    "lora": ["tuning=lora", "tuning.rank=8"],
    "qlora": ["tuning=lora", "tuning.rank=8", "quantization=nf4"],
}
REWARD = '''"""A reward that differs between completions of a random model."""


def letters(prompt: str, completion: str, row: dict) -> float:
    return sum(map(str.isalpha, completion)) / max(1, len(completion))
'''
IMPORTS = {
    "training": "deepspeed, peft, bitsandbytes, transformers.models.llama.modeling_llama, orchestrator.stages.sft, orchestrator.stages.grpo",
    "scoring": "deepspeed, transformers.models.llama.modeling_llama, orchestrator.stages.evaluate, orchestrator.stages.merge",
}
"""What the ranks import; those that train nothing need less, and must not hide behind it."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A method and a size in a folder."""

    name: str
    folder: Path
    shape: Shape

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.folder / "runs" / self.name)

    @property
    def base(self) -> Path:
        return self.folder / f"base-{self.shape.hidden}x{self.shape.layers}"

    @property
    def stage(self) -> StageFolder:
        return self.run.stage("sft")

    def overrides(self) -> list[str]:
        """The settings of every stage: three steps of four short rows."""
        rows, held_out = self.folder / "rows.jsonl", self.folder / "held_out.jsonl"
        reward = f"[{{source: '{self.folder / 'reward.py'}:letters', weight: 1.0, options: {{}}}}]"
        stages = ["sft", "evaluate", "grpo"] if self.name == "full" else ["sft", "evaluate", "merge", "grpo"]
        trained = [
            f"stages.{stage}.{setting}"
            for stage in ("sft", "grpo")
            for setting in ("epochs=null", "max_steps=3", "batch.micro_size=1", "checkpoint.probe_rows=4")
        ]
        scored = [
            f"stages.{stage}.{setting}" for stage in ("evaluate", "merge") for setting in ("rows=4", "micro_size=1")
        ]
        data = [f"stages.{stage}.data.train.path={held_out}" for stage in ("evaluate", "merge")]
        return [
            "+experiment=llama_rlhf",
            f"pipeline=[{','.join(stages)}]",
            f"name={self.name}",
            f"output_dir={self.folder / 'runs'}",
            f"model.base={self.base}",
            "model.dtype=float32",
            "tracking=none",
            "sharding=zero3",
            "launcher=torchrun",
            "cluster.device=cpu",
            f"cluster.processes_per_node={RANKS}",
            *METHODS[self.name],
            *trained,
            *scored,
            *data,
            f"stages.sft.data.train.path={rows}",
            f"stages.sft.data.eval.path={held_out}",
            "stages.sft.batch.global_size=4",
            "stages.sft.checkpoint.every_steps=1",
            "stages.evaluate.rewards=[]",
            "stages.evaluate.forgetting=false",
            *(f"stages.{stage}.start_from=sft" for stage in stages[1:]),
            f"stages.grpo.data.train.path={self.folder / 'prompts.jsonl'}",
            "stages.grpo.data.eval.path=none",
            "stages.grpo.batch.global_size=8",
            "stages.grpo.rollout={prompts: 4, group_size: 2, max_new_tokens: 8, generate_size: 2}",
            f"stages.grpo.rewards={reward}",
            "stages.grpo.accept_weak_reward=true",
        ]


def main() -> int:
    options = parsed()
    folder: Path = options.folder.resolve()
    if options.what == "table":
        print(sharded_table.table(json.loads((folder / "sharded.json").read_text(encoding="utf-8")), SIZES, RANKS))
        return 0
    prepare(folder)
    results = folder / "sharded.json"
    known: dict[str, Any] = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {"steps": {}}
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ORCHESTRATOR_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    known["bare"] = {kind: bare(imports, environment) for kind, imports in IMPORTS.items()}
    failed = False
    for name in options.cells.split(","):
        cell = Cell(name=name, folder=folder, shape=SIZES[options.size][name])
        write_base(cell.base, cell.shape)
        for step in options.steps.split(","):
            key = f"{name}/{step}"
            if known["steps"].get(key, {}).get("code") == 0 or (name == "full" and step == "merge"):
                continue
            found = measured(cell, step, environment) | {"cell": name, "step": step, "size": options.size}
            known["steps"][key] = found
            write_json(results, known)
            failed |= found["code"] != 0
            print(f"{key}: code {found['code']}, {found['seconds']} s", flush=True)
    return int(failed)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "table"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=tuple(SIZES), default="large")
    parser.add_argument("--cells", default=",".join(METHODS))
    parser.add_argument("--steps", default=",".join(STEPS))
    return parser.parse_args()


def prepare(folder: Path) -> None:
    """Write rows, prompts and the reward."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_model.write_rows(folder / "rows.jsonl", 16)
    tiny_model.write_rows(folder / "held_out.jsonl", 8, start=1000)
    prompts = [json.dumps({"prompt": f"Say {number}", "answer": str(number)}) for number in range(16)]
    (folder / "prompts.jsonl").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")


def bare(imports: str, environment: Mapping[str, str]) -> dict[str, int]:
    """Bytes of a worker with its imports that has done nothing."""
    program = f"import sys, {imports}; sys.path.append({str(Path(__file__).parent)!r})\nimport resident; print(resident.resident_of('self'))"
    argv = [sys.executable, "-c", program]
    done = subprocess.run(argv, env=dict(environment), capture_output=True, text=True, check=True, cwd=ROOT)
    return ast.literal_eval(done.stdout.splitlines()[-1])


def measured(cell: Cell, step: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """Run one command of a cell under watch; its planned bytes by phase come with it."""
    program = [sys.executable, "-m", "orchestrator"]
    stage = {"train": "sft", "resume": "sft", "export": "sft"}.get(step, step)
    if step == "export":
        argv = [
            *program,
            "export",
            str(cell.run.root),
            "--stage",
            "sft",
            "--to",
            str(cell.folder / f"export-{cell.name}"),
        ]
    else:
        argv = [*program, "run", "--only", stage, *cell.overrides()]
    kill_when: Callable[[], bool] | None = partial(_has_saved, cell.stage, 2) if step == "train" else None
    watched = watch(
        argv,
        run=cell.run.root,
        environment=environment,
        log=cell.folder / f"{cell.name}-{step}.log",
        kill_when=kill_when,
        only_phase=step if step == "export" else None,
    )
    code = watched.code
    if step == "train":  # it is killed, and must be
        code = 0 if code == -9 and not cell.stage.result.exists() else 1
    planned = _planned(program, cell, stage, environment)
    return {"code": code, "seconds": watched.seconds, "peaks": watched.peaks, "planned": planned}


def _has_saved(stage: StageFolder, step: int) -> bool:
    return max(saved_steps(stage), default=0) >= step


def _planned(program: list[str], cell: Cell, stage: str, environment: Mapping[str, str]) -> dict[str, int]:
    argv = [*program, "plan", *cell.overrides(), "format=json"]
    done = subprocess.run(argv, env=dict(environment), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {}
    stages = {one["name"]: one for one in json.loads(done.stdout)["stages"]}
    memory = stages[stage].get("memory")
    return {} if memory is None else planned_bytes(memory["phases"])


if __name__ == "__main__":
    sys.exit(main())
