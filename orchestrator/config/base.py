"""The base class of every section of the configuration. Defaults are in conf/. Must not import torch."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

JsonValue: TypeAlias = "str | int | float | bool | list[JsonValue] | dict[str, JsonValue] | None"
PositiveInt = Annotated[int, Field(ge=1)]
NaturalInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NaturalFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
IDENTIFIER_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
Identifier = Annotated[str, Field(pattern=IDENTIFIER_PATTERN)]


class Section(BaseModel):
    """Base of every section: immutable; an unknown key is an error.

    Most sections are only validated as part of another, so their own validator is built on first use.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True, protected_namespaces=())


def flatten(tree: JsonValue, prefix: str = "") -> dict[str, JsonValue]:
    """Dotted keys of the leaves."""
    if isinstance(tree, dict) and tree:
        return {key: leaf for name, value in tree.items() for key, leaf in flatten(value, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): tree}
