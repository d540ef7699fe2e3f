"""ULMFiT's claim (1801.06146, table 6) on questions: gradual unfreezing with rates by layer and a slanted triangle beats full
fine-tuning, and the head alone is far worse.

    python benchmarks/ulmfit.py FOLDER [RUNS]     FOLDER holds trec_train.jsonl and trec_test.jsonl (text, label)

The lowest 8 layers of SmolLM2-135M (57 M parameters), 320 train questions, 40 steps of 16 for every method, three seeds (of new
weights and of the order of rows); error on 200 test questions. About 12 minutes on one core that has nothing else to do. Runs
that are done in RUNS are read.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

import questions

SEEDS = (0, 1, 2)
LAYERS, STEPS, TRAIN_ROWS, TEST_ROWS = 8, 40, 320, 200
GRADUAL = (
    "tuning=freeze",
    "tuning.layers=all",
    "tuning.head=true",
    "tuning.unfreeze_every_steps=4",
    "schedule@stages.classify.schedule=slanted_triangular",
    "stages.classify.optimizer.lr=5e-4",
)
METHODS = {
    "full": ("tuning=full", "stages.classify.optimizer.lr=1e-4"),
    "head only": ("tuning=freeze", "tuning.layers=none", "stages.classify.optimizer.lr=1e-3"),
    "gradual, rates x 1/2.6 a layer, slanted": (*GRADUAL, "stages.classify.optimizer.layer_decay=0.385"),
}
"""The head has a rate of 1e-3 in each; what is below it has its method's."""


def main(folder: Path, runs: Path) -> int:
    runs.mkdir(parents=True, exist_ok=True)
    train = questions.write_first(folder / "trec_train.jsonl", runs / "train.jsonl", TRAIN_ROWS)
    test = questions.write_first(folder / "trec_test.jsonl", runs / "test.jsonl", TEST_ROWS)
    base = questions.first_layers(runs / "base", LAYERS)
    print(
        "| method | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " | mean error | spread |\n|---|" + "---:|" * 5
    )
    for method, words in METHODS.items():
        given = [*words, *data_words(train, test), f"model.base={base}"]
        errors = [100 * (1 - accuracy(runs, method, seed, given)) for seed in SEEDS]
        cells = " | ".join(f"{error:.1f} %" for error in errors)
        print(f"| {method} | {cells} | {statistics.mean(errors):.1f} % | {statistics.stdev(errors):.1f} |", flush=True)
    return 0


def data_words(train: Path, test: Path) -> list[str]:
    return [
        f"stages.classify.data.train.path={train}",
        f"stages.classify.data.eval.path={test}",
        f"stages.classify.max_steps={STEPS}",
        "stages.classify.epochs=null",
        "stages.classify.optimizer.head_lr=1e-3",
    ]


def accuracy(runs: Path, method: str, seed: int, words: list[str]) -> float:
    """Of one run on the test questions; the classifier is proven as in every run."""
    name = f"{method.split(',')[0].replace(' ', '-')}-{seed}"
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
    place = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(tempfile.mkdtemp(prefix="ulmfit-"))
    sys.exit(main(Path(sys.argv[1]), place.resolve()))
