"""LP-FT (2202.10054) and WiSE-FT (2109.01903) on classifiers of sentiment, trained on films, tested on films and on shops.

    python benchmarks/probing.py DATA [RUNS] [--seeds 0,1,2]      prints the tables of docs/robustness.md

DATA holds imdb_dev.jsonl, imdb_test.jsonl and yelp_test.jsonl (text; label, 0 negative, 1 positive), texts cut to 50 words. SmolLM2-135M
with a new head: the head alone (linear probing), everything from a new head (fine-tuning), everything from the probed head (LP-FT), as
many steps each time for what is trained last; and the weights between probed and LP-FT model. Every number is the whole command's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import questions
import wise

TRAIN_ROWS, TEST_ROWS, CHOICE_ROWS = 480, 400, 60
STEPS = {"head": 120, "all": 60}
HEAD_RATE = "1e-3"
"""Of a new head; a probed one goes on at the rate of all."""
RATES = {"head": HEAD_RATE, "all": "3e-5"}
ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
SETS = ("data", "shops_test", "films_choice", "shops_choice")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs"))
    parser.add_argument("--seeds", default="0,1,2")
    options = parser.parse_args()
    runs = options.runs.resolve()
    rows = write_rows(options.data, runs / "probing_rows")
    curves: list[dict[str, Any]] = []
    tuned: list[dict[str, float]] = []
    for seed in options.seeds.split(","):
        name = f"probing-{seed}"
        questions.run([*lpft_words(rows), f"name={name}", f"output_dir={runs}", f"seed={seed}"])
        curves.append(json.loads((runs / name / "wise/curves.json").read_text(encoding="utf-8")))
        questions.run([*ft_words(rows), f"name=ft-{seed}", f"output_dir={runs}", f"seed={seed}"])
        report = json.loads((runs / f"ft-{seed}" / "score/artifact/report.json").read_text(encoding="utf-8"))
        tuned.append({key: report["sets"][key]["accuracy"] for key in SETS})
        for run in (runs / name, runs / f"ft-{seed}"):
            for large in (*run.glob("*/checkpoints/*/*"), *run.glob("*/artifact/*.safetensors")):
                large.unlink()
    tell(curves, tuned)
    return 0


def write_rows(data: Path, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    films, shops = wise.balanced(data / "imdb_dev.jsonl"), wise.balanced(data / "yelp_test.jsonl")
    wise.write(folder / "train.jsonl", films[:TRAIN_ROWS])
    wise.write(folder / "films_choice.jsonl", films[TRAIN_ROWS : TRAIN_ROWS + CHOICE_ROWS])
    wise.write(folder / "films_test.jsonl", wise.balanced(data / "imdb_test.jsonl")[:TEST_ROWS])
    wise.write(folder / "shops_test.jsonl", shops[:TEST_ROWS])
    wise.write(folder / "shops_choice.jsonl", shops[TEST_ROWS : TEST_ROWS + CHOICE_ROWS])
    return folder


def lpft_words(rows: Path) -> list[str]:
    return [
        "+experiment=llama_classify",
        "pipeline=[head,classify,wise]",
        "tuning=full",
        "+stage@stages.head=classify",
        "+tuning@stages.head.tuning=freeze",
        "stages.head.tuning.layers=none",
        *training_words("head", rows, "head", head_rate=HEAD_RATE),
        "stages.classify.start_from=head",
        *training_words("classify", rows, "all", head_rate="null"),
        "+stage@stages.wise=interpolate",
        "stages.wise.origin=head",
        f"stages.wise.alphas={list(ALPHAS)}",
        "stages.wise.choose_on=[films_choice,shops_choice]",
        *scoring_words("wise", rows),
    ]


def ft_words(rows: Path) -> list[str]:
    return [
        "+experiment=llama_classify",
        "pipeline=[classify,score]",
        "tuning=full",
        *training_words("classify", rows, "all", head_rate=HEAD_RATE),
        "+stage@stages.score=evaluate",
        *scoring_words("score", rows),
    ]


def training_words(stage: str, rows: Path, what: str, *, head_rate: str) -> list[str]:
    own = {
        "data.train.path": rows / "train.jsonl",
        "data.eval.path": "none",
        "data.max_length": 128,
        "epochs": "null",
        "max_steps": STEPS[what],
        "batch.global_size": 8,
        "batch.micro_size": 8,
        "optimizer.lr": RATES[what],
        "optimizer.head_lr": head_rate,
        "checkpoint.every_steps": "null",
        "checkpoint.rehearse": "false",
        "log_every_steps": 10,
    }
    return [f"stages.{stage}.{key}={value}" for key, value in own.items()]


def scoring_words(stage: str, rows: Path) -> list[str]:
    sets = ", ".join(
        f"{name}: {{path: {rows / name}.jsonl, shift: {str('shops' in name).lower()}}}" for name in SETS[1:]
    )
    return [
        f"stages.{stage}.data.train.path={rows / 'films_test.jsonl'}",
        f"stages.{stage}.data.train.format=classification",
        f"stages.{stage}.data.max_length=128",
        f"stages.{stage}.sets={{{sets}}}",
        f"stages.{stage}.rows={TEST_ROWS}",
        f"stages.{stage}.micro_size=8",
        "launcher=local",
        "tracking=none",
    ]


def tell(curves: list[dict[str, Any]], tuned: list[dict[str, float]]) -> None:
    """Accuracy of every model on every set, as the mean over the seeds (lowest to highest)."""
    print(
        "| model | films (test) | shops (test, shift) | films (choice) | shops (choice, shift) |\n|---|---|---|---|---|"
    )
    names = {0.0: "the head alone (LP), a = 0", 1.0: "LP-FT, a = 1"}
    for place, alpha in enumerate(curves[0]["alphas"]):
        found = [{key: one["scores"][place][key]["accuracy"] for key in SETS} for one in curves]
        print(line(names.get(alpha, f"a = {alpha:g}"), found))
    print(line("everything from a new head (FT)", tuned))
    chosen = ", ".join(f"{one['chosen']:g}" for one in curves)
    print(f"chosen by id_within on the choice sets: a = {chosen}")


def line(name: str, found: list[dict[str, float]]) -> str:
    cells = []
    for key in SETS:
        values = [one[key] for one in found]
        cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
