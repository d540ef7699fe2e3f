"""The wheel, installed and used from a hostile folder that has its own conf/, launchers/ and slurm/: nothing of it is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from bench import Bench
from command_line import files_of

import orchestrator
from orchestrator.files.atomic import read_json
from orchestrator.run_folder.folder import RunFolder

SOURCE = Path(orchestrator.__file__).parent.parent
PACKAGES = ("launchers", "slurm", "orchestrator")


@dataclass(frozen=True)
class Installed:
    """A wheel in a folder of its own, and a folder that means no good."""

    wheel: Path
    target: Path
    hostile: Path

    def run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """A command in the hostile folder; the wheel stands before the checkout that this environment installs."""
        environment = {name: value for name, value in os.environ.items() if name != "WANDB_API_KEY"}
        environment |= {
            "PYTHONPATH": str(self.target),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "ORCHESTRATOR_CACHE": str(self.target.parent / "cache"),
            "WANDB_MODE": "offline",
        }
        return subprocess.run(
            argv, cwd=self.hostile, env=environment, capture_output=True, text=True, timeout=400, check=False
        )

    def orchestrate(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "orchestrator", *words)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    root = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(root / "dist"), str(SOURCE)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = (root / "dist").glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", str(root / "target"), str(wheel)], check=True
    )
    for name in ("conf", "launchers", "slurm"):
        package = root / "hostile" / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"raise RuntimeError('the {name} of the working folder was imported')\n")
    (root / "hostile" / "conf" / "config.yaml").write_text("name: [broken\n")
    return Installed(wheel, root / "target", root / "hostile")


def test_everything_that_is_not_python_is_in_the_wheel(installed: Installed) -> None:
    shipped = set(zipfile.ZipFile(installed.wheel).namelist())
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "conf", *PACKAGES]
    tracked = subprocess.run(listing, cwd=SOURCE, capture_output=True, text=True, check=True).stdout.split("\n")
    files = {name for name in tracked if name and (SOURCE / name).is_file()}
    wanted = {f"orchestrator/{name}" if name.startswith("conf/") else name for name in files}
    assert wanted - shipped == set()
    counts = {
        suffix: sum(name.endswith(suffix) for name in shipped)
        for suffix in (".yaml", ".jsonl", ".sh", ".bash", ".sbatch")
    }
    assert counts[".yaml"] >= 37 and counts[".jsonl"] == 6
    assert counts[".sh"] + counts[".bash"] >= 6 and counts[".sbatch"] >= 1
    assert not [name for name in shipped if name.split("/")[0] not in PACKAGES and ".dist-info/" not in name]
    assert [name for name in shipped if name.endswith(".dist-info/licenses/LICENSE")]
    assert not [name for name in shipped if "__pycache__" in name or name.startswith(("tests/", "runs/", "wandb/"))]


def test_the_installed_code_is_what_runs(installed: Installed) -> None:
    code = "import orchestrator.__main__, sys; print(orchestrator.__file__)"
    assert installed.run(sys.executable, "-P", "-c", code).stdout.strip().startswith(str(installed.target))
    version = installed.run(
        sys.executable, "-P", "-c", "from importlib.metadata import version; print(version('finetune-orchestrator'))"
    )
    assert version.stdout.strip() == orchestrator.__version__


@pytest.mark.parametrize("program", ["module", "script"])
def test_help_plan_and_render_from_the_hostile_folder(installed: Installed, tmp_path: Path, program: str) -> None:
    argv = (
        [sys.executable, "-m", "orchestrator"]
        if program == "module"
        else [sys.executable, str(installed.target / "bin" / "orchestrator")]
    )
    told = installed.run(*argv, "--help")
    assert told.returncode == 0 and "llama_lora" in told.stdout, told.stderr
    planned = installed.run(*argv, "plan", "+experiment=llama_lora", "format=json")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["stages"][0]["train_rows"] >= 240
    rendered = installed.run(*argv, "render", "+experiment=llama3_8b_lora", "launcher=slurm", f"output_dir={tmp_path}")
    assert rendered.returncode == 0, rendered.stderr
    assert "#SBATCH --gpus-per-node=8" in rendered.stdout
    assert {name.split("/")[0] for name in files_of(installed.hostile)} == {"conf", "launchers", "slurm"}


def test_a_fault_is_told_from_the_hostile_folder_too(installed: Installed) -> None:
    told = installed.orchestrate("plan", "+experiment=llama_lora", "stages.sft.optimzer.lr=1")
    assert (told.returncode, told.stderr) == (
        2,
        "error: stages.sft.optimzer.lr: unknown key; did you mean stages.sft.optimizer.lr?\n",
    )


def test_a_tiny_run_from_the_hostile_folder(installed: Installed, bench: Bench) -> None:
    run = RunFolder(installed.hostile / "runs" / "hostile")
    words = bench.words("hostile", "launcher=local", "tracking=wandb", "stages.sft.max_steps=2")
    words[words.index(f"output_dir={bench.runs}")] = "output_dir=runs"
    ended = installed.orchestrate(*words)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    result = read_json(run.stage("sft").result)
    assert result["steps"] == 2 and result["artifact"]["path"] == "artifact"
    assert list(run.stage("sft").wandb.rglob("*.wandb"))  # no key: offline by itself
    script = (run.scripts / "sft.sh").read_text()
    assert str(SOURCE) not in script.replace(sys.executable, "")
