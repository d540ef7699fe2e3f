"""Keys and tokens for a Slurm job in a file of mode 0600: never in a script, an argv or Slurm's own records."""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from slurm.commands import is_secret


def write_secrets(path: str, environment: Mapping[str, str]) -> tuple[str, ...]:
    """Write the environment's secrets as shell exports; returns their names. No secrets: the file goes away."""
    secrets = {name: value for name, value in sorted(environment.items()) if value and is_secret(name)}
    secrets = {name: value for name, value in secrets.items() if name.isidentifier() and name.isascii()}
    file = Path(path)
    if not secrets:
        file.unlink(missing_ok=True)
        return ()
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as output:
        output.writelines(f"export {name}={shlex.quote(value)}\n" for name, value in secrets.items())
    temporary.replace(file)
    return tuple(secrets)
