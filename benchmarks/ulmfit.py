"""ULMFiT's claim (1801.06146, table 6) on questions: gradual unfreezing with rates by layer and a slanted triangle beats full
fine-tuning, and the head alone is far worse.

    python benchmarks/ulmfit.py FOLDER [RUNS] [--layers 8] [--rows 1600] [--steps 200]

FOLDER holds trec_train.jsonl and trec_test.jsonl (text, label). The lowest layers of SmolLM2-135M, steps of 16 questions for every
method, three seeds (of new weights and of the order of rows); error on the 603 test questions. Gradual unfreezing opens its levels in
the first half of the steps. Runs that are done in RUNS are read.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
from pathlib import Path

import questions

SEEDS = (0, 1, 2)
TEST_ROWS = 603
GRADUAL = (
    "tuning=freeze",
    "tuning.layers=all",
    "tuning.head=true",
    "schedule@stages.classify.schedule=slanted_triangular",
    "stages.classify.optimizer.lr=5e-4",
)
METHODS = {
    "full": ("tuning=full", "stages.classify.optimizer.lr=1e-4"),
    "head only": ("tuning=freeze", "tuning.layers=none", "stages.classify.optimizer.lr=1e-3"),
    "gradual, rates x 1/2.6 a layer, slanted": (*GRADUAL, "stages.classify.optimizer.layer_decay=0.385"),
    "gradual, rates x 0.8 a layer, slanted": (*GRADUAL, "stages.classify.optimizer.layer_decay=0.8"),
}
"""The head has a rate of 1e-3 in each; what is below it has its method's."""


def main() -> int:
    options = parsed()
    folder, runs = options.folder, (options.runs or Path(tempfile.mkdtemp(prefix="ulmfit-"))).resolve()
    runs.mkdir(parents=True, exist_ok=True)
    train = questions.write_first(folder / "trec_train.jsonl", runs / f"train-{options.rows}.jsonl", options.rows)
    test = questions.write_first(folder / "trec_test.jsonl", runs / "test.jsonl", TEST_ROWS)
    base = questions.first_layers(runs / f"base-{options.layers}", options.layers)
    print(
        "| method | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " | mean error | spread |\n|---|" + "---:|" * 5
    )
    for method, words in METHODS.items():
        if "gradual" in method:
            words = (*words, f"tuning.unfreeze_every_steps={max(1, options.steps // 2 // options.layers)}")
        given = [*words, *data_words(train, test, options.steps), f"model.base={base}"]
        sizes = f"{options.layers}-{options.rows}-{options.steps}"
        errors = [100 * (1 - accuracy(runs, f"{method} {sizes}", seed, given)) for seed in SEEDS]
        cells = " | ".join(f"{error:.1f} %" for error in errors)
        print(f"| {method} | {cells} | {statistics.mean(errors):.1f} % | {statistics.stdev(errors):.1f} |", flush=True)
    return 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("runs", type=Path, nargs="?")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=1600, help="train questions")
    parser.add_argument("--steps", type=int, default=200)
    return parser.parse_args()


def data_words(train: Path, test: Path, steps: int) -> list[str]:
    return [
        f"stages.classify.data.train.path={train}",
        f"stages.classify.data.eval.path={test}",
        f"stages.classify.max_steps={steps}",
        "stages.classify.epochs=null",
        "stages.classify.optimizer.head_lr=1e-3",
    ]


def accuracy(runs: Path, method: str, seed: int, words: list[str]) -> float:
    """Of one run on the test questions; the classifier is proven as in every run."""
    name = f"{re.sub('[^a-z0-9.]+', '-', method)}-{seed}"
    common = questions.words_of(["classify"])
    questions.run(["+experiment=llama_classify", f"name={name}", f"output_dir={runs}", f"seed={seed}", *common, *words])
    result = questions.result_of(runs / name, "classify")
    for large in (
        *(runs / name / "classify").glob("checkpoints/*/*"),
        *(runs / name).glob("classify/artifact/*.safetensors"),
    ):
        large.unlink()
    return result["classification"]["held_out"]["accuracy"]


if __name__ == "__main__":
    sys.exit(main())
