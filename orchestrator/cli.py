"""Verbs of the command line; turns every known fault into sentences and an exit code. Must not import torch."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from launchers.spec import InvalidValueError, LaunchError
from orchestrator.errors import (
    EXIT_DEFECT,
    EXIT_DONE,
    EXIT_LAUNCH_FAILED,
    EXIT_SAVED,
    EXIT_USER,
    ConfigError,
    OrchestratorError,
    nearest,
)

USAGE = """\
python -m orchestrator [VERB] [overrides | RUN_DIR]     takes a pretrained language model to a fine-tuned, proven one

  run       check, plan, launch; continues an unfinished run (the default verb)
  plan      print stages, data, steps, memory, time, cost; format=json for machines; nothing is submitted;
            cluster.nodes=1,2,4,...,512 makes it a scaling table; advise=true: what else would fit, the fastest first
  check     the whole look before the spend, through the code that trains: rows, masks, one tiny backward
  prepare   tokenise and pack the data as a CPU job of its own (RUN_DIR, or overrides)
  render    write the scripts into the run folder and print them; nothing is submitted
  status    RUN_DIR: where a run stands (or a folder of runs); --watch keeps a live table
  logs      RUN_DIR: the last lines of its newest log; -f follows it, --stage S, --node N
  cancel    RUN_DIR: ask it to save and end, then end it, then look that it has ended
  resume    RUN_DIR: go on with an unfinished run, from its folder alone
  audit     RUN_DIR: prove that every row was taken exactly once an epoch
  verify-resume  train a few steps straight and with a kill in between, and compare; steps=N
  generate  RUN_DIR --prompt TEXT: the tuned model beside its base; without --prompt one prompt a line from stdin
  export    RUN_DIR: the adapter merged and measured, with a model card, as a folder to publish; --to FOLDER, --stage S
  report    STUDY_DIR: the tables and the picture of a study (study=seeds, study=optuna), from what its trials have so far
  doctor    the machine, the versions; what works, first cause of what does not

  Overrides are Hydra's: +experiment=NAME, group=choice, key=value. --config-dir DIR adds a folder of your own.
  study=seeds runs every seed of weights and data; -m study=optuna searches the words that hold several values.
  --only STAGE runs one stage of a pipeline; --from STAGE runs it anew, with all that depend on it.
  -m makes one run of each combination of values: -m stages.sft.optimizer.lr=1e-4,2e-4 (for run, plan and render).
  Experiments: {experiments}

  python -m orchestrator +experiment=llama_lora                         the main job
  python -m orchestrator plan +experiment=llama_lora sharding=zero2     what it would do
  python -m orchestrator +experiment=llama_lora name=mine stages.sft.data.train.path=rows.jsonl

  Exit codes: 0 done or submitted; 2 a mistake in the input; 3 launch failed; 75 saved and wants to go on;
  93 do not restart; 1 a defect or a crash.
"""


Verb = Callable[[Sequence[str]], int]
VERBS = {
    "run": "commands",
    "plan": "commands",
    "render": "commands",
    "resume": "commands",
    "check": "looking",
    "prepare": "looking",
    "verify-resume": "looking",
    "audit": "looking",
    "status": "inspection",
    "logs": "inspection",
    "cancel": "inspection",
    "generate": "inspection",
    "export": "inspection",
    "report": "inspection",
    "doctor": "inspection",
}
"""The module of every verb, imported only where it is asked for."""


def main(argv: Sequence[str]) -> int:
    """Runs one command; the process's exit code."""
    try:
        return _dispatch(list(argv))
    except OrchestratorError as error:
        return _tell(error.problems, error.exit_code)
    except InvalidValueError as error:
        return _tell(str(error).splitlines(), EXIT_USER)
    except LaunchError as error:
        return _tell(str(error).splitlines(), EXIT_LAUNCH_FAILED)
    except KeyboardInterrupt:
        return _tell(["interrupted before anything was started"], EXIT_SAVED)
    except PermissionError as error:
        return _tell([f"{error.filename}: no permission to read or write it"], EXIT_USER)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except Exception:
        traceback.print_exc()
        print("error: this is a defect of the orchestrator; the lines above belong in a report", file=sys.stderr)
        return EXIT_DEFECT


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        return _help()
    word = argv[0]
    if "=" in word or word.startswith(("+", "-", "~")):
        return _verb("run")(argv)
    if word not in VERBS:
        guess = nearest(word, VERBS)
        raise ConfigError(
            f"{word}: no such verb" + (f"; did you mean {guess}?" if guess else f"; verbs are {', '.join(VERBS)}")
        )
    if "-h" in argv[1:] or "--help" in argv[1:]:
        return _help()
    return _verb(word)(argv[1:])


def _verb(name: str) -> Verb:
    module = importlib.import_module(f"orchestrator.{VERBS[name]}")
    return vars(module)[name.replace("-", "_")]


def _help() -> int:
    from orchestrator.words import CONF, choices_of

    print(USAGE.format(experiments=", ".join(choices_of("experiment", [CONF]))))
    return EXIT_DONE


def _tell(problems: Sequence[str], code: int) -> int:
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return code


def run_folder_argument(arguments: Sequence[str], verb: str) -> Path:
    """The RUN_DIR of a verb, which must hold a run.json."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise ConfigError(f"{verb} takes one run folder and nothing else: python -m orchestrator {verb} runs/NAME")
    folder = Path(arguments[0])
    if not (folder / "run.json").is_file():
        raise ConfigError(f"{folder} is no run folder: it holds no run.json")
    return folder.resolve()
