"""The table of verbs: what each does, where its code is, three examples. Must import nothing heavy: every start reads it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

DEFAULT = "run"
"""The verb of a command line that names none."""


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One verb. Its module has `configure(parser)`, which declares its arguments, and `run(arguments)`, which does it.

    Both are imported for this verb alone, so the module's top may import only argparse and `orchestrator.cli`; the rest
    belongs inside `run`.
    """

    name: str
    group: str
    summary: str
    """One line of the top-level help."""
    examples: tuple[str, str, str]
    """What follows `python -m orchestrator `."""
    details: str = ""
    """More sentences for the verb's own help."""
    interrupted: str = ""
    """How to continue after a Ctrl-C outside a job. Read-only verbs end silently, like `tail -f`."""

    @property
    def module_name(self) -> str:
        return f"orchestrator.cli.{self.name.replace('-', '_')}"

    def load(self) -> ModuleType:
        return importlib.import_module(self.module_name)


GOES_ON = "interrupted; the same command continues with what is left"
START, LOOK, FOLDER, OTHER = "Train", "Before a run", "A run, from its folder", "Other"
HIDDEN = ""
"""Group of verbs that only programs call; omitted from the help."""
GROUPS = (START, LOOK, FOLDER, OTHER)

_TABLE = (
    Verb(
        name="run",
        group=START,
        summary="check, plan and launch; continues an unfinished run (the default verb)",
        examples=(
            "run +experiment=llama_lora",
            "run +experiment=llama_lora name=mine stages.sft.data.train.path=rows.jsonl",
            "run -m +experiment=llama_lora stages.sft.optimizer.lr=1e-4,2e-4",
        ),
        details="study=seeds runs every seed of weights and data; -m study=optuna searches the overrides that hold several values.",
        interrupted=GOES_ON,
    ),
    Verb(
        name="resume",
        group=START,
        summary="continue an unfinished run, from its folder alone",
        examples=("resume runs/llama_lora", "resume ../elsewhere/llama_lora", "resume /scratch/me/runs/mine"),
        interrupted=GOES_ON,
    ),
    Verb(
        name="fork",
        group=START,
        summary="a new run from another run's checkpoint or artifact, with other settings",
        examples=(
            "fork runs/a name=b stages.sft.optimizer.lr=1e-4",
            "fork runs/a name=longer stages.sft.max_steps=400 --from checkpoint",
            "fork runs/a name=c stages.sft.data.train.path=more.jsonl --step 100 --no-start",
        ),
        details="The parent is only read: it may be moved, read-only or still running.",
        interrupted="interrupted; `resume` continues the new run if its folder exists, else the same command creates it",
    ),
    Verb(
        name="plan",
        group=LOOK,
        summary="stages, data, steps, memory, time and cost; writes nothing",
        examples=(
            "plan +experiment=llama_lora sharding=zero2",
            "plan +experiment=llama3_8b_lora cluster.nodes=1,2,4,...,64",
            "plan +experiment=llama_lora format=json",
        ),
        details="cluster.nodes=1,2,4,...,512 makes it a scaling table; advise=true also lists other settings that would fit, fastest first.",
    ),
    Verb(
        name="check",
        group=LOOK,
        summary="every row, the masks and one tiny backward pass, with the training code",
        examples=(
            "check +experiment=llama_lora",
            "check +experiment=llama_lora stages.sft.data.train.path=rows.jsonl",
            "check +experiment=llama_dpo",
        ),
    ),
    Verb(
        name="render",
        group=LOOK,
        summary="write the scripts into the run folder and print them; submits nothing",
        examples=(
            "render +experiment=llama_lora",
            "render +experiment=llama3_8b_lora launcher=slurm",
            "render -m +experiment=llama_lora seed=1,2",
        ),
    ),
    Verb(
        name="prepare",
        group=LOOK,
        summary="tokenise and pack the data, here or as a CPU job (overrides, or RUN_DIR)",
        examples=(
            "prepare +experiment=llama_lora",
            "prepare +experiment=llama_lora stages.sft.data.packing=best_fit",
            "prepare runs/llama_lora",
        ),
        interrupted=GOES_ON,
    ),
    Verb(
        name="verify-resume",
        group=LOOK,
        summary="train a few steps with and without a kill, and compare",
        examples=(
            "verify-resume +experiment=llama_lora",
            "verify-resume +experiment=llama_lora steps=4",
            "verify-resume +experiment=llama_lora sharding=zero2 steps=6",
        ),
    ),
    Verb(
        name="status",
        group=FOLDER,
        summary="the state of a run, or of every run in a folder",
        examples=(
            "status runs/llama_lora",
            "status runs --show lr,optimizer.lr,memory",
            "status runs/llama_lora --watch",
        ),
    ),
    Verb(
        name="logs",
        group=FOLDER,
        summary="the last lines of its newest logs: steps, evaluations, warnings",
        examples=(
            "logs runs/llama_lora -n 100",
            "logs runs/llama_lora -f",
            "logs runs/llama_rlhf --stage grpo --node 1",
        ),
    ),
    Verb(
        name="compare",
        group=FOLDER,
        summary="runs side by side: keys that differ, losses, speed, memory, cost",
        examples=("compare runs/a runs/b", "compare runs", "compare runs/a runs/b ../old/runs/c format=json"),
    ),
    Verb(
        name="cancel",
        group=FOLDER,
        summary="ask it to save and end; end what does not",
        examples=("cancel runs/llama_lora", "cancel runs/mine", "cancel /scratch/me/runs/mine"),
    ),
    Verb(
        name="audit",
        group=FOLDER,
        summary="prove that every row was used exactly once per epoch",
        examples=("audit runs/llama_lora", "audit runs/mine", "audit /scratch/me/runs/mine"),
    ),
    Verb(
        name="generate",
        group=FOLDER,
        summary="answers of the tuned model next to those of its base",
        examples=(
            'generate runs/llama_lora --prompt "Who wrote Faust?"',
            "generate runs/llama_lora --examples 3",
            "generate runs/llama_lora < prompts.txt",
        ),
        details="Without --prompt and --examples, each line of standard input is one prompt.",
    ),
    Verb(
        name="export",
        group=FOLDER,
        summary="merge the adapter, measure the result and write a folder to publish",
        examples=(
            "export runs/llama_lora",
            "export runs/llama_lora --to my_model",
            "export runs/llama_rlhf --stage sft --max-kl 0.05",
        ),
    ),
    Verb(
        name="report",
        group=FOLDER,
        summary="tables and picture of a study (study=seeds, study=optuna) from its trials so far",
        examples=("report runs/llama_lora-study", "report runs/mine-study", "report /scratch/me/runs/mine-study"),
    ),
    Verb(
        name="rm",
        group=FOLDER,
        summary="delete runs, after asking; refuses running ones and folders that are not runs",
        examples=("rm runs/a", "rm runs/a runs/b --yes", "rm runs/mine-study"),
        details="The trials of a study are runs of their own.",
    ),
    Verb(
        name="prune",
        group=FOLDER,
        summary="delete what runs no longer need: old checkpoints, superseded stages, unused caches",
        examples=("prune --dry-run", "prune runs/a", "prune runs --yes"),
        details="Given a folder of runs, it also looks for prepared data and dequantised bases that none of these runs uses.",
    ),
    Verb(
        name="init",
        group=LOOK,
        summary="write a commented experiment file of your own, for `run FILE`",
        examples=(
            "init my.yaml",
            "init my.yaml --data rows.jsonl --method qlora",
            "init my.yaml --task classify --data labels.csv --gpus 2",
        ),
        details="On a terminal it asks for what no option gives; elsewhere the defaults are taken.",
    ),
    Verb(
        name="config",
        group=LOOK,
        summary="the composed configuration, with the file and line of every value",
        examples=(
            "config +experiment=llama_lora stages.sft.optimizer",
            "config +experiment=llama_lora stages.sft.optimizer.lr=1e-4 --diff",
            "config runs/llama_lora",
        ),
    ),
    Verb(
        name="keys",
        group=OTHER,
        summary="the reference of every key: type, allowed values, default, unit, meaning",
        examples=("keys optimizer", "keys '*.lr'", "keys learning_rate"),
    ),
    Verb(
        name="completion",
        group=OTHER,
        summary="print the script that makes bash, zsh or fish complete the command line",
        examples=(
            "completion bash > ~/.local/share/bash-completion/completions/orchestrator",
            "completion zsh > ~/.zfunc/_orchestrator",
            "completion fish > ~/.config/fish/completions/orchestrator.fish",
        ),
        details="It completes the command `orchestrator`: verbs, options, experiments, groups, keys, values and run folders.",
    ),
    Verb(
        name="complete",
        group=HIDDEN,
        summary="candidates for the last word of a command line, for the completion scripts",
        examples=("complete -- pl", "complete -- plan +experiment=", "complete -- plan +experiment=llama_lora tuning."),
    ),
    Verb(
        name="doctor",
        group=OTHER,
        summary="this machine, the versions, what works, and why the rest does not",
        examples=("doctor", "doctor | grep NO", "doctor > machine.txt"),
    ),
)
VERBS: Mapping[str, Verb] = {verb.name: verb for verb in _TABLE}
