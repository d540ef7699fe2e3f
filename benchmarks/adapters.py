"""Every adapter in every cell of the table, and LoReFT beside LoRA at the same number of parameters.

    python benchmarks/adapters.py table [METHOD ...]       some 40 minutes on one core: the table of docs/adapters.md
    python benchmarks/adapters.py arc FOLDER [STEPS ROWS]  some 25 minutes on one core: ARC-easy from FOLDER/arc-easy_{train,test}.jsonl

A cell is four steps on a tiny model at two gloo ranks, the same again from the checkpoint of step 2, and the same in one process. A
method's last column is the whole command with its proof, under the last sharding that it works with.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

ARC = {
    "LoReFT, rank 4, 30 layers": (
        "tuning=loreft",
        "tuning.rank=4",
        "stages.sft.optimizer.lr=4e-3",
        "stages.sft.optimizer.weight_decay=0",
    ),
    "LoRA, rank 3, k_proj and v_proj": (
        "tuning=lora",
        "tuning.rank=3",
        "tuning.alpha=6",
        "tuning.target_modules=[k_proj,v_proj]",
        "stages.sft.optimizer.lr=2e-3",
    ),
}
ANSWERS = [f"the correct answer is answer{number}" for number in (1, 2, 3, 4)]


METHODS = {
    "lora": ("tuning=lora",),
    "lora, rsLoRA, LoRA+": (
        "tuning=lora",
        "tuning.use_rslora=true",
        "tuning.lora_plus_ratio=16",
        "stages.sft.optimizer.lr=5e-4",  # times 16 for B: at the others' rate Adam makes steps of the roundings
    ),
    "lora, DoRA": ("tuning=lora", "tuning.use_dora=true"),
    "lora, PiSSA": ("tuning=lora", "tuning.init=pissa"),
    "lora, LoftQ": ("tuning=lora", "tuning.init=loftq"),
    "ia3": ("tuning=ia3",),
    "prompt": ("tuning=prompt",),
    "prefix": ("tuning=prefix",),
    "vera": ("tuning=vera",),
    "oft": ("tuning=oft",),
    "adalora": ("tuning=adalora", "tuning.allocate_every_steps=1"),
    "loreft": ("tuning=loreft", "tuning.share_weights=false"),
    "direft": ("tuning=loreft", "tuning.variant=direft"),
}
SHARDINGS = ("none", "zero1", "zero2", "zero3")
QUANTIZATIONS = ("none", "nf4")
LONGEST = 3600
"""Seconds for one set of ranks."""
CUT = 2
"""The step whose checkpoint the second run begins with."""


def main() -> int:
    if sys.argv[1:2] == ["table"]:
        return table(sys.argv[2:] or list(METHODS))
    if sys.argv[1:2] == ["arc"]:
        steps, rows = (int(word) for word in (*sys.argv[3:5], "40", "150")[:2])
        return arc(Path(sys.argv[2]).resolve(), steps=steps, rows=rows)
    raise SystemExit(__doc__)


def table(methods: list[str]) -> int:
    """Prints a row for each method and quantization; 1 where a cell did not do what it must.

    All cells of a kind run in one set of ranks, one after the other: importing takes longer than a cell.
    """
    from rank_runs import Cell, make_place, train

    with tempfile.TemporaryDirectory() as folder:
        place = make_place(Path(folder))
        rows = [(method, quantization) for quantization in QUANTIZATIONS for method in methods]
        cells = {(*row, sharding): _made(place, *row, sharding) for row in rows for sharding in SHARDINGS}
        named = [name for name in cells.values() if name is not None]
        train(place, [Cell(run=str(place.run(name))) for name in named], ranks=2, timeout=LONGEST)
        again = [Cell(run=str(place.branch(name, f"{name}-again", step=CUT)), attempt=2) for name in named]
        train(place, again, ranks=2, timeout=LONGEST)
        alone = [
            str(_make(place, method, quantization, "none", ranks=1))
            for method, quantization in rows
            if cells[method, quantization, "none"]
        ]
        train(place, [Cell(run=run) for run in alone], ranks=1, timeout=LONGEST)
        return _print_table(place, rows, cells)


def _print_table(place: Any, rows: list[tuple[str, str]], cells: dict[tuple[str, str, str], str | None]) -> int:
    wrong = 0
    print(
        f"| method | base | {' | '.join(SHARDINGS)} | the command |\n|---|---|{'---|' * (len(SHARDINGS) + 1)}",
        flush=True,
    )
    for row in rows:
        open_ones = [sharding for sharding in SHARDINGS if cells[*row, sharding]]
        told = [_cell(place, row, cells[*row, sharding]) for sharding in SHARDINGS]
        told.append(_whole_command(place, row, open_ones[-1]) if open_ones else "-")
        wrong += sum("WRONG" in cell for cell in told)
        print(f"| {' | '.join([*row, *told])} |", flush=True)
    return 1 if wrong else 0


def _words(method: str, quantization: str, sharding: str) -> tuple[str, ...]:
    steps = ("stages.sft.max_steps=4", "stages.sft.optimizer.lr=5e-3")
    return (*steps, *METHODS[method], f"quantization={quantization}", f"sharding={sharding}")


def _key(*parts: str) -> str:
    return "-".join(parts).replace(", ", "-").replace("+", "p")


def _make(place: Any, method: str, quantization: str, sharding: str, *, ranks: int) -> Path:
    name = _key(method, quantization, sharding if ranks > 1 else "alone")
    return place.make(name, *_words(method, quantization, sharding), ranks=ranks)


def _made(place: Any, method: str, quantization: str, sharding: str) -> str | None:
    """The name of a run, or None where the configuration's rules refuse it."""
    from orchestrator.errors import ConfigError

    try:
        return _make(place, method, quantization, sharding, ranks=2).name
    except ConfigError:
        return None


def _cell(place: Any, row: tuple[str, str], name: str | None) -> str:
    """Largest relative distance of loss and gradient norm from one process, and whether a resume is the same to the bit."""
    from rank_runs import largest_difference

    if name is None:
        return "refused"
    straight, again, one = place.rows(name), place.rows(f"{name}-again"), place.rows(_key(*row, "alone"))
    keys = ("loss", "grad_norm")
    same = sorted(again) == [3, 4] and all(again[step][key] == straight[step][key] for step in again for key in keys)
    off = max(largest_difference(straight, one, key) for key in keys)
    learns = float(str(straight[4]["loss"])) != float(str(straight[1]["loss"]))
    return ("" if same and off < 1e-4 and learns else "WRONG ") + f"{off:.0e}, {'=' if same else 'differs'}"


def _whole_command(place: Any, row: tuple[str, str], sharding: str) -> str:
    """The distance of the re-opened artifact's loss from the trainer's."""
    import tiny_model
    from bench import Bench

    bench = Bench(root=place.root)
    tiny_model.write_rows(place.root / "held_out.jsonl", 9, start=1000)
    more = ("cluster.processes_per_node=2", "launcher=torchrun")
    done = bench.run(_key(*row, "whole"), *_words(*row, sharding), *more)
    if done.code:
        return f"WRONG {[line for line in done.told.splitlines() if 'rror' in line][:2]}"
    proof = done.result()["proof"]
    return f"{abs(proof['reopened_loss'] - proof['loss']):.0e}"


def arc(folder: Path, *, steps: int, rows: int) -> int:
    """Trains both on the same rows in the same order, and asks both, and the base, the same questions."""
    print("| | trained parameters | held-out loss | accuracy | seconds |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as place:
        held = Path(place) / "held_out.jsonl"
        with (folder / "arc-easy_test.jsonl").open(encoding="utf-8") as file:
            held.write_text("".join(islice(file, rows)), encoding="utf-8")
        for number, (name, words) in enumerate(ARC.items()):
            began = time.time()
            result, trained = _train(Path(place), f"arc{number}", folder, held, words, steps=steps)
            seconds = time.time() - began
            right = _accuracy(Path(place) / f"arc{number}", held)
            if not number:
                print(f"| the base | 0 | {result['eval_loss_before']:.4f} | {right['base']:.1%} | |", flush=True)
            loss = result["eval_loss_after"]
            print(f"| {name} | {trained:,} | {loss:.4f} | {right['tuned']:.1%} | {seconds:.0f} |", flush=True)
    return 0


def _train(
    place: Path, name: str, folder: Path, held: Path, words: tuple[str, ...], *, steps: int
) -> tuple[dict[str, Any], int]:
    from orchestrator.files.atomic import read_json
    from orchestrator.metrics.jsonl import read_rows
    from orchestrator.run_folder.folder import RunFolder

    common = [
        "+experiment=llama_lora",
        f"name={name}",
        f"output_dir={place}",
        f"stages.sft.data.train.path={folder / 'arc-easy_train.jsonl'}",
        f"stages.sft.data.eval.path={held}",
        f"stages.sft.max_steps={steps}",
        "stages.sft.batch.global_size=8",
        "stages.sft.batch.micro_size=8",
        "stages.sft.schedule.warmup_ratio=0.1",
        "launcher=local",
        "tracking=none",
    ]
    command = [sys.executable, "-m", "orchestrator", *common, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    stage = RunFolder(place / name).stage("sft")
    trained = next(row["trainable_parameters"] for row in read_rows(stage.events) if row["event"] == "model")
    return read_json(stage.result), int(str(trained))


def _accuracy(run: Path, held: Path) -> dict[str, float]:
    """Share of the questions whose right answer has the largest likelihood of the four, with the adapter and without."""
    import torch

    from orchestrator.config.run import RunConfig
    from orchestrator.data.encoding.encoder import encode_prompt, make_encoder
    from orchestrator.data.encoding.tokenizer import core_tokenizer, load_facts
    from orchestrator.evaluation.compare_with_base import _chat
    from orchestrator.files.atomic import read_json
    from orchestrator.models.artifact import open_artifact
    from orchestrator.models.loading import DTYPES, silence_libraries
    from orchestrator.run_folder.folder import RunFolder

    silence_libraries()
    stage = RunFolder(run).stage("sft")
    config = RunConfig.model_validate(read_json(run / "run.json")["config"], strict=False)
    base = Path(read_json(stage.result)["base"]["folder"])
    dtype = DTYPES[config.model.dtype]
    model: Any = open_artifact(stage.artifact, base_folder=base, config=config, weights_dtype=dtype).eval()
    encoder = make_encoder(load_facts(base), config.stages["sft"].data)
    written = [core_tokenizer(encoder.facts.core).encode(answer, add_special_tokens=False).ids for answer in ANSWERS]
    shared = [ids[0] for ids in zip(*written, strict=False) if len(set(ids)) == 1]
    assert all(len(ids) == len(shared) + 1 for ids in written), "the answers differ in their last token alone"
    right = {"tuned": 0, "base": 0}
    questions = [json.loads(line) for line in held.read_text(encoding="utf-8").splitlines()]
    for question in questions:
        prompt = torch.tensor([encode_prompt(_chat(question["instruction"]), encoder)])
        rest = torch.tensor([shared])
        options = [ids[-1] for ids in written]
        with torch.no_grad():
            tuned = _next_token(model, prompt, rest)[options].argmax()
            with model.disable_adapter():
                plain = _next_token(model, prompt, rest)[options].argmax()
        right["tuned"] += ANSWERS[int(tuned)] == question["output"]
        right["base"] += ANSWERS[int(plain)] == question["output"]
    return {name: count / len(questions) for name, count in right.items()}


def _next_token(model: Any, prompt_BT: Any, rest_BT: Any) -> Any:
    """Logits after prompt and rest; the prompt alone is where LoReFT acts, as in generation."""
    cache = model(input_ids=prompt_BT, use_cache=True).past_key_values
    return model(input_ids=rest_BT, past_key_values=cache, use_cache=True).logits[0, -1]


if __name__ == "__main__":
    sys.exit(main())
