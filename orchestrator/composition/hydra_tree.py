"""Hydra's part: the tree of the chosen files, and its errors as sentences. Must not import torch."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from orchestrator.composition.yaml_locations import unreadable_files
from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from hydra._internal.config_loader_impl import ConfigLoaderImpl


def compose_tree(choices: Sequence[str], roots: Sequence[Path]) -> DictConfig:
    """The tree of the chosen files.

    Hydra also composes settings of its own, which nothing here reads and which take half of the time: they are skipped
    unless a file refers to them.
    """
    from hydra import compose as hydra_compose
    from hydra._internal.config_repository import CachingConfigRepository
    from hydra._internal.defaults_list import create_defaults_list
    from hydra.core.override_parser.overrides_parser import OverridesParser

    with _hydra(roots) as loader:
        if _speaks_of_hydra(roots):
            return hydra_compose("config", overrides=list(choices))
        files = CachingConfigRepository(loader.repository)
        overrides = OverridesParser.create().parse_overrides(list(choices))
        chosen = create_defaults_list(
            repo=files, config_name="config", overrides_list=overrides, prepend_hydra=False, skip_missing=False
        )
        return loader._compose_config_from_defaults_list(chosen.defaults, files)  # pyright: ignore[reportPrivateUsage]


def chosen_files(choices: Sequence[str], roots: Sequence[Path]) -> list[tuple[Path, str]]:
    """The files of the tree, each with its package, in composition order."""
    from hydra.types import RunMode

    with _hydra(roots) as loader:
        defaults = loader.compute_defaults_list("config", list(choices), RunMode.RUN).defaults
    found = [(file_of(str(entry.config_path), roots), str(entry.package or "")) for entry in defaults]
    return [(file, package) for file, package in found if file is not None]


def file_of(config_path: str, roots: Sequence[Path]) -> Path | None:
    """The file of `group/name` in the first folder that has it."""
    files = [root / f"{config_path}.yaml" for root in roots]
    return next((file for file in files if file.is_file()), None)


@contextmanager
def as_sentences(roots: Sequence[Path]) -> Generator[None]:
    """Turns the errors of Hydra, OmegaConf and YAML into sentences."""
    from hydra.errors import HydraException

    try:
        yield
    except HydraException as error:
        raise ConfigError(_one_line(error)) from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {_one_line(error)}") from None
    except (YAMLError, ValueError, TypeError, AttributeError, OSError):
        problems = unreadable_files(roots)
        if problems:
            raise ConfigError(problems) from None
        raise


@contextmanager
def _hydra(roots: Sequence[Path]) -> Generator[ConfigLoaderImpl]:
    """Hydra initialised over the folders, in order of precedence."""
    from hydra import initialize_config_dir
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.global_hydra import GlobalHydra

    with initialize_config_dir(config_dir=str(roots[-1]), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        assert isinstance(loader, ConfigLoaderImpl)
        for root in reversed(roots[:-1]):  # hydra.searchpath would append them, and so shadow them
            loader.config_search_path.prepend("folder of the user", f"file://{root}", "main")
        loader.repository.initialize_sources(loader.config_search_path)
        yield loader


def _speaks_of_hydra(roots: Sequence[Path]) -> bool:
    """Whether a file may contain a `hydra:` section (a search path, say), or choose one of Hydra's own groups."""
    return any(b"hydra" in file.read_bytes() for root in roots for file in root.rglob("*.yaml") if file.is_file())


def _one_line(error: Exception) -> str:
    """Hydra's or OmegaConf's message without internals."""
    message = " ".join(str(error).split())
    return message.split(" Config search path:")[0].split(" full_key:")[0]
