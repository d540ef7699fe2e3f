"""Fill a script template: `@{name}` becomes a value, once; shell dollars are left unchanged."""

import re
from collections.abc import Mapping

_PLACE = re.compile(r"@\{(\w+)\}")


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with every placeholder filled; placeholders and values must match one to one."""
    assert set(_PLACE.findall(template)) == set(values), set(_PLACE.findall(template)) ^ set(values)
    return _PLACE.sub(lambda found: values[found[1]], template)
