"""A package of another project called `launchers` or `slurm` is named and refused; none of its code runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import orchestrator

SOURCE = Path(orchestrator.__file__).parent.parent


def ask(*argv: str, path: Path, cwd: Path = SOURCE) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(path)}
    return subprocess.run(argv, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=60)


def foreign(folder: Path, name: str) -> Path:
    """A package that leaves a mark when it is imported."""
    package = folder / name
    package.mkdir(parents=True)
    mark = folder / f"{name}.imported"
    (package / "__init__.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    return mark


@pytest.mark.parametrize("name", ["launchers", "slurm"])
@pytest.mark.parametrize("in_checkout", [True, False], ids=["checkout", "elsewhere"])
def test_a_foreign_package_on_pythonpath_is_refused_and_never_imported(
    tmp_path: Path, name: str, in_checkout: bool
) -> None:
    mark = foreign(tmp_path, name)
    cwd = SOURCE if in_checkout else tmp_path
    path = tmp_path if in_checkout else Path(f"{tmp_path}{os.pathsep}{SOURCE}")
    refused = ask(sys.executable, "-m", "orchestrator", "plan", "+experiment=llama_lora", path=path, cwd=cwd)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert refused.stderr.startswith(
        f"error: another project's package is called {name} too: {tmp_path / name} comes before"
    )
    assert not mark.exists()


def test_a_folder_without_init_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    assert ask(sys.executable, "-m", "orchestrator", "--help", path=tmp_path).returncode == 0


def test_a_package_installed_over_ours_is_named(tmp_path: Path) -> None:
    for name in ("orchestrator", "launchers", "slurm"):
        shutil.copytree(SOURCE / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "training"))
    shutil.copytree(SOURCE / "conf", tmp_path / "orchestrator" / "conf")
    assert ask(sys.executable, "-m", "orchestrator", "--help", path=tmp_path, cwd=tmp_path).returncode == 0
    (tmp_path / "slurm" / "__init__.py").write_text('"""Another project\'s bindings."""\n')
    refused = ask(sys.executable, "-m", "orchestrator", "--help", path=tmp_path, cwd=tmp_path)
    assert refused.returncode == 2 and f"{tmp_path / 'slurm'} was overwritten by it" in refused.stderr


def test_the_python_api_refuses_too(tmp_path: Path) -> None:
    """A script's own folder is on the path of the script, and its packages come before ours."""
    mark = foreign(tmp_path, "launchers")
    (tmp_path / "script.py").write_text("from orchestrator import compose\n")
    refused = ask(sys.executable, "script.py", path=SOURCE, cwd=tmp_path)
    assert (
        refused.returncode == 1 and "ImportError: another project's package is called launchers too" in refused.stderr
    )
    assert not mark.exists()
