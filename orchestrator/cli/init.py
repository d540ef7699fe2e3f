"""`init`: write a commented experiment file from flags or questions, and prove that it composes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from orchestrator.cli.arguments import one_of, whole_number
from orchestrator.cli.parser import PROGRAM, VerbParser
from orchestrator.errors import EXIT_DONE, ConfigError

TASKS = {"sft": "demonstration", "dpo": "demonstration_preferences", "classify": "demonstration_requests"}
"""Stage -> the set that ships with this tool for it."""
METHODS = {"lora": ("lora", "none", "2.0e-4"), "qlora": ("lora", "nf4", "2.0e-4"), "full": ("full", "none", "2.0e-5")}
"""Method -> tuning, quantization, learning rate."""
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
ROWS_A_STEP = 8
QUESTIONS: tuple[tuple[str, str, str, Callable[[str], object]], ...] = (
    ("task", "task: sft (answers), dpo (preferences) or classify (labels)", "sft", one_of(*TASKS)),
    ("base", "base model: hub id or folder", BASE, str),
    ("data", "rows to train on: file, folder or hub id (empty: the set that ships with this tool)", "", str),
    ("method", "method: lora, qlora or full", "lora", one_of(*METHODS)),
    ("gpus", "GPUs (or CPU processes) on this machine to use", "1", whole_number(1)),
)
TEMPLATE = """\
# @package _global_
# Purpose: {method} {task} of {base}.
# Command: {program} run {file}
# Look first: {program} plan {file}; config {file} shows every key with its source, keys explains them.
# Paths here are relative to the folder in which the command is typed, as on the command line.
defaults:
  - /stage@stages.{task}: {task}         # {program} keys +stage lists the kinds
  - override /tuning: {tuning}             # full, freeze, lora, ...
  - override /quantization: {quantization}       # nf4 holds the base in 4 bits (QLoRA)
  - override /sharding: {sharding}           # zero2 and zero3 shard the model's states over several GPUs
  - _self_                           # what follows wins over the files above

name: {name}                         # the run folder is output_dir/name
pipeline: [{task}]
model:
  base: {base}
cluster:
  processes_per_node: {gpus}              # one process for each GPU
stages:
  {task}:
    epochs: 3                        # passes over the rows; max_steps: N instead limits the steps
    batch:
      global_size: {global_size}                 # rows of an optimizer step, over all processes
      micro_size: 1                  # rows of one forward pass; more is faster where memory allows
    optimizer:
      lr: {lr}                     # peak learning rate
    data:
      train:
        path: {data}
      eval:
        path: auto                   # a part of the rows is held out; or a file, or none
      max_length: 1024               # tokens of a row; longer ones are cut and counted
"""


def configure(parser: VerbParser) -> None:
    parser.takes = "one new file that ends in .yaml"
    parser.add_argument("file", metavar="FILE", help="experiment file to write, such as my.yaml")
    for name, question, default, parse in QUESTIONS:
        parser.add_argument(
            f"--{name}", type=parse, metavar=name.upper(), help=f"{question}; {default or 'that set'} if left out"
        )
    parser.add_argument("--force", action="store_true", help="replace a file that exists")


def run(arguments: argparse.Namespace) -> int:
    from orchestrator.files.atomic import write_text

    file = Path(arguments.file).expanduser()
    _check_target(file, arguments.file, replace=arguments.force)
    answers = {name: vars(arguments)[name] for name, *_ in QUESTIONS}
    if sys.stdin.isatty() and sys.stdout.isatty():
        answers = {name: _ask(name, value) for name, value in answers.items()}
    text = experiment_text(file, {name: value for name, value in answers.items() if value not in (None, "")})
    _check_composes(text)
    write_text(file, text)
    print(f"wrote {file}\n  {PROGRAM} plan {file}     what it would do\n  {PROGRAM} run {file}      do it")
    return EXIT_DONE


def experiment_text(file: Path, answers: dict[str, object]) -> str:
    """The file for the given answers, with defaults for the other questions."""
    values = {name: default for name, _, default, _ in QUESTIONS} | answers
    task, gpus = str(values["task"]), int(str(values["gpus"]))
    tuning, quantization, lr = METHODS[str(values["method"])]
    return TEMPLATE.format(
        program=PROGRAM,
        file=file,
        task=task,
        method={"full": "full", "lora": "LoRA", "qlora": "QLoRA"}[str(values["method"])],
        base=json.dumps(values["base"]),  # quoted as YAML needs it
        data=json.dumps(values["data"] or TASKS[task]),
        tuning=tuning,
        quantization=quantization,
        sharding="zero2" if gpus > 1 else "none",
        name=json.dumps("".join(sign if sign.isalnum() and sign.isascii() else "_" for sign in file.stem)),
        gpus=gpus,
        lr=lr,
        global_size=-(-ROWS_A_STEP // gpus) * gpus,  # the processes split the rows evenly
    )


def _check_target(file: Path, text: str, *, replace: bool) -> None:
    if file.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{text}: an experiment file ends in .yaml; type init {file.with_suffix('.yaml')}")
    if file.is_dir() or not file.parent.is_dir():
        raise ConfigError(
            f"{text}: {'a folder has this name' if file.is_dir() else f'there is no folder {file.parent}'}"
        )
    from orchestrator.run_state.freeze import run_around

    run = run_around(file)
    if run is not None:
        raise ConfigError(f"{text} would be inside the run {run}; choose a path outside it")
    if file.exists() and not replace:
        raise ConfigError(f"{text} exists; give another name, or --force to replace it")


def _ask(name: str, given: object) -> object:
    """The answer to a question on the terminal, repeated until it is valid."""
    question, default, parse = next(entry[1:] for entry in QUESTIONS if entry[0] == name)
    while given is None:
        answer = input(f"{question} [{default}]: ").strip() or default
        try:
            given = parse(answer)
        except argparse.ArgumentTypeError as error:
            print(error)
    return given


def _check_composes(text: str) -> None:
    """Refuse answers that no run could use, before anything is written."""
    import tempfile

    from orchestrator.composition.compose import examine

    with tempfile.TemporaryDirectory(prefix="orchestrator-") as folder:
        trial = Path(folder, "experiment.yaml")
        trial.write_text(text, encoding="utf-8")
        problems = examine([str(trial)]).problems
    if problems:
        raise ConfigError(problems)
