"""The reference of every key: type, allowed values, default, unit and description, from the types and from conf/.

Must not import torch.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from omegaconf import OmegaConf
from pydantic.fields import FieldInfo

from orchestrator.composition.hydra_tree import compose_tree
from orchestrator.composition.overrides import CONF, RECIPE, TOP_GROUPS, choices_of
from orchestrator.config.autos import AUTO, STAGE, takes_auto
from orchestrator.config.base import IDENTIFIER_PATTERN, JsonValue, Section
from orchestrator.config.run import RunConfig
from orchestrator.config.validation_messages import DISCRIMINATORS

MAP_NAMES = {"stages": STAGE, "sets": "SET"}
"""Placeholder of a name that the user chooses."""
STAGE_GROUPS = ("optimizer", "schedule", "data")
UNITS = {
    "_seconds": "seconds",
    "_minutes": "minutes",
    "_hours": "hours",
    "_steps": "steps",
    "_tokens": "tokens",
    "_gib": "GiB",
    "_mib": "MiB",
    "_tflops": "TFLOP/s",
    "_ratio": "share",
    "_share": "share",
    "max_length": "tokens",
    "epochs": "passes over the rows",
    "fraction": "share",
}
"""End of a key -> its unit."""
PLAIN = {
    "account": "Slurm account that the job is charged to.",
    "alpha": "Scale of the adapter's update.",
    "beta1": "Decay of the optimizer's first moment.",
    "beta2": "Decay of the optimizer's second moment.",
    "constraint": "Slurm features that a node must have.",
    "cpus_per_task": "CPUs of one task.",
    "dropout": "Dropout of the adapter's input.",
    "entity": "W&B user or team.",
    "epsilon": "Added to the root of the second moment.",
    "format": "`auto` detects the format.",
    "gpu_type": "Slurm's name of the GPU, such as h100.",
    "gpus_per_node": "GPUs requested on each node.",
    "kind": "Selects the alternative of this section.",
    "launcher": "How the job is started.",
    "log_every_steps": "Steps between two rows of metrics.jsonl and lines of the log.",
    "method": "Selects the alternative of this section.",
    "name": "Name of the alternative.",
    "nodes": "Nodes of the job.",
    "offload_optimizer": "Hold optimizer states in host memory.",
    "output_dir": "Folder of the run folders.",
    "overlap_communication": "Reduce gradients during the backward pass.",
    "partition": "Slurm partition.",
    "project": "W&B project.",
    "qos": "Slurm quality of service.",
    "quantization": "How the frozen base is held.",
    "rank": "Rank of the low-rank matrices.",
    "scheme": "Selects the alternative of this section.",
    "seed": "Seed of everything, unless `seeds` says otherwise.",
    "sharding": "How the model's states are sharded across the ranks.",
    "stages": "The stages, by name.",
    "strategy": "Selects the alternative of this section.",
    "tracking": "Where metrics go besides metrics.jsonl.",
    "tuning": "What is trained: the whole model, a part of it or an adapter.",
}
"""Descriptions of fields that have no docstring in the code."""
_WHERE = "_reference"
"""Part of the tree with every choice of every group, for the defaults."""
_NOWHERE = "no default"


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key, or one group of files."""

    name: str
    type: str
    default: str
    unit: str
    sentence: str
    only: tuple[str, ...] = ()
    """Alternatives that have the key, such as `lora`; empty if all have it."""


def reference() -> list[Key]:
    """Every group and every key, sorted by name."""
    merged: dict[tuple[str, str, str], Key] = {}
    for key in _walk(RunConfig, "", ()):
        known = merged.get((key.name, key.type, key.sentence))
        only = () if known is not None and not (known.only and key.only) else key.only
        both = dict.fromkeys([*(known.only if known else ()), *only]) if only or known is None else {}
        merged[(key.name, key.type, key.sentence)] = replace(key, only=tuple(both))
    trees = _trees()
    keys = [replace(key, default=_default(key, trees)) for key in merged.values()]
    return sorted([*_groups(), *keys], key=lambda key: (key.name, key.only))


def _walk(section: type[Section], prefix: str, only: tuple[str, ...]) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        sentence = _sentences(section).get(name) or _of_section(field.annotation) or PLAIN.get(name, "")
        yield Key(name=key, type=_type_of(key, field), default="", unit=_unit(name), sentence=sentence, only=only)
        yield from _below(field.annotation, key, only)


def _below(annotation: Any, key: str, only: tuple[str, ...]) -> Iterator[Key]:
    """Keys of the sections inside an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield from _walk(annotation, f"{key}.", _alternatives(annotation) or only)
        return
    inner = get_args(annotation)
    if get_origin(annotation) is dict:
        yield from _below(inner[1], f"{key}.{MAP_NAMES.get(key.rpartition('.')[2], 'NAME')}", only)
    elif get_origin(annotation) is tuple:
        yield from _below(inner[0], f"{key}.0", only)
    else:
        for each in inner:
            yield from _below(each, key, only)


def _of_section(annotation: Any) -> str:
    """The docstring of a field's section."""
    if isinstance(annotation, type) and issubclass(annotation, Section) and annotation.__doc__ != Section.__doc__:
        return " ".join((annotation.__doc__ or "").split())
    return ""


def _alternatives(section: type[Section]) -> tuple[str, ...]:
    """The values of `kind`, `method` or a similar field that select this section; empty if none does."""
    for name in DISCRIMINATORS:
        if name in section.model_fields and get_origin(section.model_fields[name].annotation) is Literal:
            return tuple(str(value) for value in get_args(section.model_fields[name].annotation))
    return ()


def _type_of(key: str, field: FieldInfo) -> str:
    typed = _type(field.annotation, field.metadata)
    return f"{AUTO} | {typed}" if takes_auto(key) else typed


def _type(annotation: Any, metadata: Sequence[Any]) -> str:
    """An annotation in plain English: `int >= 1`, `a | b`, `list of text`."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        more = [part for extra in inner[1:] if isinstance(extra, FieldInfo) for part in extra.metadata]
        return _type(inner[0], [*metadata, *more])
    if origin is Literal:
        return " | ".join(str(value) for value in inner)
    if origin in (Union, UnionType):
        parts = [_type(each, metadata if each is not NoneType else ()) for each in inner]
        return " | ".join(dict.fromkeys(parts))
    if origin is tuple:
        return f"list of {_type(inner[0], ())}"
    if origin is dict:
        return f"map of names to {_type(inner[1], ())}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    if annotation is str:
        patterns = [part.pattern for part in metadata if getattr(part, "pattern", None)]
        return "name" if patterns == [IDENTIFIER_PATTERN] else "text"
    plain: dict[object, str] = {bool: "true | false", NoneType: "null", int: "int", float: "float"}
    return plain[annotation] + _range(metadata)


def _range(metadata: Sequence[Any]) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [
        (sign, value)
        for name, sign in signs.items()
        for part in metadata
        if (value := getattr(part, name, None)) is not None
    ]
    return "".join(f" {sign} {value:g}" for sign, value in bounds)


@cache
def _sentences(section: type[Section]) -> dict[str, str]:
    """The docstring under each field of a class and of those that it extends."""
    found: dict[str, str] = {}
    for cls in reversed(section.__mro__):
        if not issubclass(cls, Section):
            continue
        for node in _classes(cls.__module__).get(cls.__name__, ()):
            found |= node
    return found


@cache
def _classes(module: str) -> dict[str, list[dict[str, str]]]:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: [dict(_documented(node))] for node in tree.body if isinstance(node, ast.ClassDef)}


def _documented(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, sentence in pairwise(node.body):
        is_text = isinstance(sentence, ast.Expr) and isinstance(sentence.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            assert isinstance(sentence, ast.Expr) and isinstance(sentence.value, ast.Constant)
            yield field.target.id, " ".join(str(sentence.value.value).split())


def _unit(name: str) -> str:
    return next((unit for end, unit in UNITS.items() if name.endswith(end)), "")


def _groups() -> list[Key]:
    """The groups of conf/, as keys whose value is the name of a file."""
    chosen: Any = OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml"))
    entries: list[dict[str, str] | str] = chosen["defaults"]
    defaults: dict[str, str] = {
        key: value for entry in entries if isinstance(entry, dict) for key, value in entry.items()
    }
    names = {group: group for group in TOP_GROUPS}
    names |= {"+experiment": "experiment", "+stage@stages.STAGE": "stage", "hardware@cluster.hardware": "hardware"}
    names |= {f"{group}@stages.STAGE.{group}": group for group in STAGE_GROUPS}
    return [
        Key(
            name=f"{name}=CHOICE",
            type=" | ".join(choices_of(group, [CONF])),
            default=defaults.get(name, _NOWHERE),
            unit="",
            sentence=f"A file of conf/{group}/.",
        )
        for name, group in names.items()
    ]


def _trees() -> dict[str, Any]:
    """The default tree, with one stage of every kind, and every choice of every top group under `_reference`."""
    choices = [f"+stage@stages.{kind}={kind}" for kind in choices_of("stage", [CONF])]
    choices += [
        f"+{group}@{_WHERE}.{group}.{name}={name}" for group in TOP_GROUPS for name in choices_of(group, [CONF])
    ]
    tree: Any = OmegaConf.to_container(compose_tree(choices, [CONF]), resolve=False)
    for stage in tree["stages"].values():
        stage.pop(RECIPE, None)
    return tree


def _default(key: Key, trees: dict[str, Any]) -> str:
    """The value in conf/; if several files set the key, each value with the files' names."""
    parts = key.name.split(".")
    if parts[:2] == ["stages", "STAGE"]:
        locations: dict[str, list[Any]] = {kind: [stage, *parts[2:]] for kind, stage in trees["stages"].items()}
    elif parts[0] in trees[_WHERE] and len(parts) > 1:
        choices = trees[_WHERE][parts[0]].items()
        locations = {
            name: [content, *parts[1:]] for name, content in choices if not key.only or _chooses(content) in key.only
        }
    else:
        locations = {"": [trees, *parts]}
    values = {name: value for name, (tree, *path) in locations.items() if (value := _value(tree, path)) is not None}
    names: dict[str, list[str]] = {}
    for name, value in values.items():
        names.setdefault(value, []).append(name)
    if len(names) < 2:
        return next(iter(names), _NOWHERE)
    return "; ".join(f"{value} ({', '.join(found)})" for value, found in names.items())


def _chooses(content: Any) -> str | None:
    """The alternative that a file of a group selects."""
    return next((str(content[name]) for name in DISCRIMINATORS if name in content), None)


def _value(tree: Any, path: Sequence[str]) -> str | None:
    """A leaf as it would be typed; None if the key is missing or a section."""
    node: JsonValue = tree
    for part in path:
        if not isinstance(node, dict) or part not in node:
            return None
        node = node[part]
    if isinstance(node, dict) and node:
        return None
    return node if isinstance(node, str) else json.dumps(node, ensure_ascii=False)
