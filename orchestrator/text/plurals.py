"""Numbers with their nouns; must not import anything."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """`1 node`, `2 nodes`, `1,024 processes`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
