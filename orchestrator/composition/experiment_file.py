"""An experiment file anywhere, given by its path (`run my.yaml`) instead of +experiment=NAME. Must not import torch."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from orchestrator.composition.yaml_locations import file_problems
from orchestrator.config.base import JsonValue
from orchestrator.errors import ConfigError, nearest

SUFFIXES = (".yaml", ".yml")
HEADER = "# @package _global_"
_NAME = "experiment_file"
_HEADER_LINE = re.compile(r"#\s*@package\s+_global_\s*$")
_LONGEST_NAME = 100


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Search path of the composition: the folders with groups, and the experiment file if one was given by its path."""

    roots: tuple[Path, ...]
    file: Path | None = None
    link: Path | None = None
    """Where Hydra finds the file: a temporary group `experiment`."""

    @property
    def choices(self) -> list[str]:
        """The override that chooses the experiment file."""
        return [] if self.file is None else [f"+experiment={_NAME}"]

    def as_given(self, text: str) -> str:
        """A message or location with the path as the user typed it."""
        if self.file is None:
            return text
        return text.replace(str(self.link), str(self.file)).replace(f"'experiment/{_NAME}'", str(self.file))

    def default_name(self) -> str | None:
        """The run's name if the file sets none: the file's own name, so that two files never share a run folder."""
        if self.file is None:
            return None
        content: JsonValue = yaml.safe_load(self.file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and "name" in content:
            return None
        return re.sub(r"[^A-Za-z0-9._-]+", "_", self.file.stem).strip("._-")[:_LONGEST_NAME] or None


def is_experiment_file(text: str) -> bool:
    """Whether an argument is the path of a YAML file; with an equals sign only if the file exists."""
    if not text.endswith(SUFFIXES) or text.startswith(("+", "-")):
        return False
    return "=" not in text or Path(text).is_file()


@contextmanager
def open_sources(overrides: Sequence[str], roots: Sequence[Path]) -> Generator[tuple[list[str], Sources]]:
    """The overrides without the experiment file, and the search path; ConfigError for a file that is no experiment."""
    files = [text for text in overrides if is_experiment_file(text)]
    rest = [text for text in overrides if text not in files]
    if not files:
        yield rest, Sources(roots=tuple(roots))
        return
    experiments = [text for text in rest if text.startswith(("+experiment=", "experiment=", "++experiment="))]
    if len(files) > 1 or experiments:
        raise ConfigError(_too_many(files, experiments))
    file = Path(files[0]).expanduser()
    problems = _problems(file, files[0])
    if problems:
        raise ConfigError(problems)
    # Hydra finds experiments by name in a folder called experiment; a link in a temporary folder provides that.
    with tempfile.TemporaryDirectory(prefix="orchestrator-") as folder:
        link = Path(folder, "experiment", f"{_NAME}.yaml")
        link.parent.mkdir()
        link.symlink_to(file.resolve())
        yield rest, Sources(roots=(Path(folder), *roots), file=file, link=link)


def _too_many(files: Sequence[str], experiments: Sequence[str]) -> str:
    given = " ".join([*files, *experiments])
    if len(files) > 1:
        return f"{given}: a run has one experiment; leave out all files but one"
    name = experiments[0].partition("=")[2]
    return (
        f"{given}: a run has one experiment, and {files[0]} is one; leave out {experiments[0]}, or let the file build on it: "
        f"`- {name}` as the first entry of its defaults"
    )


def _problems(file: Path, text: str) -> list[str]:
    """Why a file is no experiment, with the line."""
    if file.is_dir():
        return [f"{text} is a folder; an experiment file is needed"]
    if not file.is_file():
        known = [str(other) for suffix in SUFFIXES for other in file.parent.glob(f"*{suffix}")]
        guess = nearest(str(file), known)
        hint = f"did you mean {guess}?" if guess else f"`init {text}` writes one"
        return [f"{text}: there is no such file; {hint}"]
    broken = file_problems(file)
    if broken:
        return [problem.replace(str(file), text) for problem in broken]
    lines = file.read_text(encoding="utf-8").splitlines()
    if not any(line.strip() and not line.lstrip().startswith("#") for line in lines):
        return [f"{text} holds no keys; `init {file.with_stem(file.stem + '_new')}` writes an experiment file"]
    # Hydra reads the header only from the first lines, not below another comment.
    head = next(line.strip() for line in lines if line.strip())
    if _HEADER_LINE.fullmatch(head):
        return []
    return [f"{text}:1 is not an experiment file: its first line must be `{HEADER}`, so that its keys are at the root"]
