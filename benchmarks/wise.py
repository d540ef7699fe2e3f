"""WiSE-FT and LP-FT on sentiment: SmolLM2-135M-Instruct answers `positive` or `negative`, trained on films, tested on films and shops.

    python benchmarks/wise.py DATA [RUNS [wise_ft|wise_lpft]]      about 35 minutes on one free core; prints the tables of docs/robustness.md

DATA holds imdb_dev.jsonl, imdb_test.jsonl and yelp_test.jsonl with the fields text and label (0 negative, 1 positive). Both
runs are the whole command: training, interpolation between the instruct model (theta_0, zero-shot) and the tuned one, choice of a
on rows that no test set holds, proof. Seed 0; rows are cut to so many words and drawn by a fixed shuffle.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORDS = 50
TRAIN_ROWS, TEST_ROWS, CHOICE_ROWS = 480, 100, 30
ANSWERS = ("negative", "positive")
QUESTION = "Is this review positive or negative? Answer with one word.\n\n"
ALPHAS = {"wise_ft": "[0.0,0.2,0.4,0.6,0.8,1.0]", "wise_lpft": "[0.5,1.0]"}


def main() -> int:
    data, runs = Path(sys.argv[1]).resolve(), Path(sys.argv[2] if len(sys.argv) > 2 else "runs").resolve()
    rows = runs / "wise_rows"
    rows.mkdir(parents=True, exist_ok=True)
    films, shops = asked(data / "imdb_dev.jsonl"), asked(data / "yelp_test.jsonl")
    write(rows / "train.jsonl", films[:TRAIN_ROWS])
    write(rows / "films_choice.jsonl", films[TRAIN_ROWS : TRAIN_ROWS + CHOICE_ROWS])
    write(rows / "films_test.jsonl", asked(data / "imdb_test.jsonl")[:TEST_ROWS])
    write(rows / "shops_test.jsonl", shops[:TEST_ROWS])
    write(rows / "shops_choice.jsonl", shops[TEST_ROWS : TEST_ROWS + CHOICE_ROWS])
    for name, words in (("wise_ft", _ft_words(rows)), ("wise_lpft", _lpft_words(rows))):
        if name not in (sys.argv[3:] or ALPHAS):
            continue
        words += [*_common(rows), f"stages.wise.alphas={ALPHAS[name]}", f"name={name}", f"output_dir={runs}"]
        argv = [sys.executable, "-m", "orchestrator", *words]
        subprocess.run(argv, check=True)
        print(_table(name, json.loads((runs / name / "wise" / "curves.json").read_text())), flush=True)
    return 0


def _ft_words(rows: Path) -> list[str]:
    return ["+experiment=llama_full", "pipeline=[sft,wise]", *_training("sft", rows, steps=60, rate="2e-5")]


def _lpft_words(rows: Path) -> list[str]:
    head = _training("head", rows, steps=30, rate="2e-4")
    return ["+experiment=llama_lpft", "pipeline=[head,sft,wise]", *head, *_training("sft", rows, steps=30, rate="2e-5")]


def _training(stage: str, rows: Path, *, steps: int, rate: str) -> list[str]:
    """60 steps in all, of 8 rows: one pass over the training rows."""
    return [
        f"stages.{stage}.data.train.path={rows / 'train.jsonl'}",
        f"stages.{stage}.data.eval.path=none",
        f"stages.{stage}.max_steps={steps}",
        f"stages.{stage}.batch={{global_size: 8, micro_size: 4}}",
        f"stages.{stage}.optimizer.lr={rate}",
        f"stages.{stage}.checkpoint.rehearse=false",
    ]


def _common(rows: Path) -> list[str]:
    sets = ", ".join(
        f"{name}: {{path: {rows / name}.jsonl, shift: {str(name.startswith('shops')).lower()}}}"
        for name in ("films_choice", "shops_test", "shops_choice")
    )
    return [
        "+stage@stages.wise=interpolate",
        f"stages.wise.data.train.path={rows / 'films_test.jsonl'}",
        f"stages.wise.sets={{{sets}}}",
        "stages.wise.choose_on=[films_choice,shops_choice]",
        f"stages.wise.rows={TEST_ROWS}",
        "seed=0",
        "launcher=local",
        "tracking=none",
    ]


def asked(path: Path) -> list[dict[str, str]]:
    """Balanced rows as questions to an instruct model."""
    return [
        {"instruction": QUESTION + row["text"], "input": "", "output": ANSWERS[row["label"]]} for row in balanced(path)
    ]


def balanced(path: Path) -> list[dict[str, Any]]:
    """Rows in a fixed random order, both labels in turns, each text cut to its first words."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    sides = [[row for row in rows if row["label"] == label] for label in (0, 1)]
    return [
        {"text": " ".join(str(row["text"]).replace("\\n", " ").split()[:WORDS]), "label": int(row["label"])}
        for pair in zip(*sides, strict=False)
        for row in pair
    ]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _table(name: str, curves: dict) -> str:
    lines = [
        f"\n{name}, chosen a = {curves['chosen']:g}: {curves['why']}",
        "| a | films_test | shops_test | films_choice | shops_choice | general text, perplexity |",
        "|---|---|---|---|---|---|",
    ]
    for alpha, scores in zip(curves["alphas"], curves["scores"], strict=True):
        cells = [f"{scores[key]['accuracy']:.3f}" for key in ("data", "shops_test", "films_choice", "shops_choice")]
        lines.append(f"| {alpha:g} | {' | '.join(cells)} | {scores['forgetting']['perplexity']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
