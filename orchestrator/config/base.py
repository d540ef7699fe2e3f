"""What every section of the configuration is made of; no defaults (they stand in conf/), no torch."""

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
    """Base of every section: frozen, and an unknown key is an error.

    Most sections are read as a part of another, so a validator of their own is built only where one is asked for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True, protected_namespaces=())


def flatten(tree: JsonValue, prefix: str = "") -> dict[str, JsonValue]:
    """Dotted keys of the leaves."""
    if isinstance(tree, dict) and tree:
        return {key: leaf for name, value in tree.items() for key, leaf in flatten(value, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): tree}
