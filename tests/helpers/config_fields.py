"""Every section and field of the configuration."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.config.base import Section
from orchestrator.config.run import RunConfig
from orchestrator.config.validation_messages import _sections as sections_in


def all_sections(section: type[Section] = RunConfig) -> Iterator[type[Section]]:
    yield section
    for field in section.model_fields.values():
        for inner in sections_in(field.annotation):
            yield from all_sections(inner)


SECTIONS = sorted(set(all_sections()), key=lambda section: section.__name__)


FIELDS = [(section, name) for section in SECTIONS for name in section.model_fields]
