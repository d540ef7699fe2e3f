"""Each key of the configuration is read by something, is explained, and has its default in conf/, not in Python."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from config_fields import FIELDS, SECTIONS

import orchestrator
from orchestrator.composition.compose import CONF
from orchestrator.config.base import Section
from orchestrator.config.functions import FunctionSource
from orchestrator.config.rollout import RewardSource
from orchestrator.config.training import EarlyStoppingConfig

ROOT = Path(orchestrator.__file__).parent.parent
READERS = [
    file
    for folder in ("orchestrator", "launchers", "slurm")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if "config" not in file.relative_to(ROOT).parts[:-1]
]
EXPLAINED_BY_THEIR_NAME = {
    "stages", "model", "tuning", "quantization", "sharding", "cluster", "launcher", "tracking", "seeds", "seed", "batch",
    "optimizer", "schedule", "checkpoint", "faults", "data", "train", "eval", "kind", "method", "scheme", "strategy", "name",
    "nodes", "partition", "account", "qos", "constraint", "gpu_type", "gpus_per_node", "cpus_per_task", "project", "entity",
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "tie_word_embeddings", "num_experts_per_token", "architecture", "preset", "rank", "alpha", "dropout", "beta1",
    "beta2", "epsilon", "output_dir", "log_every_steps", "offload_optimizer", "overlap_communication", "format",
}  # fmt: skip


def explained_fields(section: type[Section]) -> set[str]:
    """Fields of a class, and of those that it extends, that are followed by a sentence."""
    found: set[str] = set()
    for cls in [cls for cls in section.__mro__ if issubclass(cls, Section)]:
        body = cast(ast.ClassDef, ast.parse(inspect.getsource(cls)).body[0]).body
        found |= {
            cast(ast.Name, field.target).id
            for field, sentence in pairwise(body)
            if isinstance(field, ast.AnnAssign) and isinstance(sentence, ast.Expr)
        }
    return found


def attributes_read() -> set[str]:
    """Names after a dot, wherever they are read in the code that acts on a configuration, or by a property that it reads."""
    read = names_after_a_dot(ast.parse(file.read_text(encoding="utf-8")) for file in READERS)
    for section in SECTIONS:
        for name, member in vars(section).items():
            if isinstance(member, property) and name in read:
                assert member.fget is not None
                read |= names_after_a_dot([ast.parse(textwrap.dedent(inspect.getsource(member.fget)))])
    return read


def names_after_a_dot(trees: Iterable[ast.AST]) -> set[str]:
    return {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


def test_the_scan_sees_the_whole_tree() -> None:
    assert len(READERS) > 60
    assert {"RunConfig", "SftStage", "ZeroSharding", "SourceConfig", "ClusterConfig", "WandbTracking"} <= {
        section.__name__ for section in SECTIONS
    }
    assert len(FIELDS) > 120


def test_every_key_is_read_by_something() -> None:
    read = attributes_read()
    assert [f"{section.__name__}.{name}" for section, name in FIELDS if name not in read] == []


def test_no_default_stands_in_python() -> None:
    """But for the items of a list and sections that are null there, which have no file in conf/."""
    assert [
        f"{section.__name__}.{name}"
        for section, name in FIELDS
        if not section.model_fields[name].is_required()
        and not issubclass(section, (FunctionSource, RewardSource, EarlyStoppingConfig))
    ] == []


def test_every_key_is_explained() -> None:
    bare = [(section.__name__, name) for section, name in FIELDS if name not in explained_fields(section)]
    assert [f"{section}.{name}" for section, name in bare if name not in EXPLAINED_BY_THEIR_NAME] == []


def test_every_section_is_frozen_and_refuses_unknown_keys() -> None:
    for section in SECTIONS:
        assert section.model_config.get("frozen") is True and section.model_config.get("extra") == "forbid", section
        assert section.__doc__ or section.__name__.endswith("Config"), section


@pytest.mark.parametrize(
    "group", ["cluster", "hardware", "sharding", "optimizer", "schedule", "launcher", "model", "data"]
)
def test_the_files_of_a_group_have_the_same_keys(group: str) -> None:
    files = {file.stem: yaml.safe_load(file.read_text()) for file in (CONF / group).glob("*.yaml")}
    whole = {name: set(tree) for name, tree in files.items() if not _derives(tree) and name not in ("none", "auto")}
    assert len(whole) >= 1 and len({frozenset(keys) for keys in whole.values()}) == 1, whole


def _derives(tree: dict[str, Any]) -> bool:
    """Whether a file goes on from another one of its group; to fold in one of another group (`/hardware@...`) is no such thing."""
    return any(isinstance(entry, str) and entry != "_self_" for entry in tree.get("defaults", []))
