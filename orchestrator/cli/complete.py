"""`complete`: candidates for the last word of an unfinished command line, one per line; called by the completion
scripts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from orchestrator.cli.parser import VerbParser, parser_of
from orchestrator.cli.verbs import DEFAULT, VERBS
from orchestrator.errors import EXIT_DONE

FOLDER_VERBS = ("resume", "status", "logs", "cancel", "audit", "generate", "export", "compare", "rm", "prune", "fork")
_RUNS = "runs"


def configure(parser: VerbParser) -> None:
    parser.takes = "the words of a command line after --"
    parser.add_argument("words", nargs="*", metavar="WORD", help="words of the command line, the unfinished one last")


def run(arguments: argparse.Namespace) -> int:
    words: list[str] = arguments.words
    for candidate in candidates(words):
        sys.stdout.write(f"{candidate}\n")
    return EXIT_DONE


def candidates(words: Sequence[str]) -> list[str]:
    """Completions of the last word, sorted; nothing if only the file system can complete it."""
    before, current = list(words[:-1]), words[-1] if words else ""
    verb = next((word for word in before if word in VERBS), None)
    if current.startswith("-"):
        names = parser_of(VERBS[verb or DEFAULT]).options
        return _beginning(names, current)
    if before[-1:] == ["--stage"]:
        return _beginning(_stages(before), current)
    if verb in ("completion", "help"):
        return _beginning(("bash", "zsh", "fish") if verb == "completion" else VERBS, current)
    found: list[str] = []
    if verb is None and before[:1] != ["help"] and not any("=" in word for word in before):
        found += _beginning(VERBS, current)
    if before[:1] == ["help"]:
        return _beginning(VERBS, current)
    if verb in (*FOLDER_VERBS, "prepare", "config"):
        found += _run_folders(current)
    if verb not in FOLDER_VERBS:
        found += _overrides(before, current)
    return found


def _overrides(before: Sequence[str], current: str) -> list[str]:
    """Experiments, groups with their choices, keys with their values."""
    from orchestrator.composition.overrides import CONF, TOP_GROUPS, choices_of

    roots = [*_own_folder(before), CONF]
    mark = "+" if current.startswith("+") else ""
    name, equals, _ = current.lstrip("+").partition("=")
    if equals:
        group = name.split("@")[0]
        values = choices_of(group, roots) or _values(name)
        return _beginning((f"{mark}{name}={value}" for value in values), current)
    if mark:
        return _beginning(("+experiment=",), current)
    if current.endswith((".yaml", ".yml")) or "/" in current:
        return []
    groups = [f"{group}=" for group in TOP_GROUPS]
    return _beginning([*groups, "+experiment=", *_keys(before, roots, current)], current)


def _own_folder(before: Sequence[str]) -> list[Path]:
    """The folder of --config-dir."""
    for index, word in enumerate(before):
        if word.startswith("--config-dir="):
            return [Path(word.partition("=")[2]).expanduser()]
        if word == "--config-dir" and index + 1 < len(before):
            return [Path(before[index + 1]).expanduser()]
    return []


def _keys(before: Sequence[str], roots: Sequence[Path], current: str) -> Iterable[str]:
    """Keys of the experiment on the line, one part beyond the current word; without an experiment, those of the
    defaults.
    """
    from omegaconf import OmegaConf

    from orchestrator.composition.experiment_file import open_sources
    from orchestrator.composition.hydra_tree import as_sentences, compose_tree
    from orchestrator.composition.overrides import RECIPE, dotted_keys
    from orchestrator.composition.provenance import experiment_alone
    from orchestrator.errors import ConfigError

    try:
        with open_sources(experiment_alone(before), roots) as (rest, sources), as_sentences(sources.roots):
            tree = compose_tree([*sources.choices, *rest], sources.roots)
    except ConfigError:  # an unfinished line: nothing to complete from
        return []
    keys = [key for key in dotted_keys(OmegaConf.to_container(tree)) if RECIPE not in key.split(".")]
    depth = current.count(".")
    sections = {key.rpartition(".")[0] for key in keys}
    return [f"{key}." if key in sections else f"{key}=" for key in keys if key.count(".") == depth]


def _values(key: str) -> list[str]:
    """The allowed values of a key, if they are few."""
    from orchestrator.composition.key_values import allowed_values

    return allowed_values(key)


def _run_folders(current: str) -> list[str]:
    """Run folders below runs/, or below the typed folder."""
    folder = Path(current if current.endswith("/") else str(Path(current).parent) if "/" in current else _RUNS)
    found = sorted(path.parent for path in folder.glob("*/run.json"))
    return _beginning(map(str, found), current)


def _stages(before: Sequence[str]) -> list[str]:
    """Stages of the run folder on the line."""
    from orchestrator.files.atomic import read_json
    from orchestrator.run_folder.folder import RunFolder

    for folder in map(RunFolder, map(Path, before)):
        if folder.is_run:
            return list(read_json(folder.run)["config"]["pipeline"])
    return []


def _beginning(names: Iterable[str], current: str) -> list[str]:
    return sorted({name for name in names if name.startswith(current)})
